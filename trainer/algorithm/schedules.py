"""Learning rate as a pure function of the number of images seen."""

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat


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
