"""Learning rates and weights of losses as pure functions of the number of images seen."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Learning rate of one network over the run."""

    peak: PositiveFloat = 1e-4
    """Highest learning rate of the run, reached when warm-up is over."""
    final: NonNegativeFloat = 1e-5
    """Learning rate at the last image of the run. Not used when decay is constant."""
    warmup_images: NonNegativeInt = 0
    """Training images over which the rate rises linearly from 0 to peak. 0: it starts at peak."""
    decay: Literal["cosine", "constant"] = "cosine"
    """Course after warm-up: half a cosine from peak to final (`cosine`), or peak throughout (`constant`)."""

    def __post_init__(self) -> None:
        """Refuse a decay whose final rate is above its peak."""
        if self.decay == "cosine" and self.final > self.peak:
            raise ValueError(f"final ({self.final:g}) is above peak ({self.peak:g}): set final to at most peak")


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Reconstruction loss of the generator, next to the adversarial loss."""

    weight: NonNegativeFloat = 0.0
    """Weight of the reconstruction loss in the generator's loss: the mean square of G's x0_pred minus the image. It
    gives the generator a direction before the discriminator has learned anything. 0: none, as published."""
    decay_images: PositiveInt | None = None
    """Training images over which the weight falls to 0 along half a cosine: later it would pull every sample to the
    mean of all that fit the noisy image. null: the weight stays as it is."""


def reconstruction_weight(config: ReconstructionConfig, images_seen: int) -> float:
    """Weight of the reconstruction loss in the step that starts after ``images_seen`` images."""
    if config.decay_images is None:
        return config.weight
    return config.weight * 0.5 * (1.0 + math.cos(math.pi * min(1.0, images_seen / config.decay_images)))


def learning_rate(config: LearningRateConfig, images_seen: int, total_images: int) -> float:
    """Learning rate of the step that starts after ``images_seen`` images.

    The rate depends on the number of images, so batch size and world size do not change it. After
    ``total_images`` it keeps its last value.

    Args:
        config: The schedule.
        images_seen: Images trained on before this step.
        total_images: Length of the run in images.

    Returns:
        The rate, between 0 and ``config.peak``.
    """
    if images_seen < config.warmup_images:
        return config.peak * images_seen / config.warmup_images
    if config.decay == "constant":
        return config.peak
    span = total_images - config.warmup_images
    progress = min(1.0, (images_seen - config.warmup_images) / span) if span > 0 else 1.0
    return config.final + 0.5 * (config.peak - config.final) * (1.0 + math.cos(math.pi * progress))
