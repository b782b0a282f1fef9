"""Settings that change over a run, as pure functions of the number of images seen."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from trainer.engine.interface import Decay


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """A value that moves from `start` to `end` along half a cosine, and then stays (as in R3GAN, 2501.05441)."""

    start: NonNegativeFloat
    """Value before the first image."""
    end: NonNegativeFloat
    """Value after decay_images images."""
    decay_images: PositiveInt
    """Training images over which the value moves."""


@dataclass(frozen=True, kw_only=True)
class DecayCosine:
    """As `Cosine`, for the decay of a moving average."""

    start: Decay
    """Value before the first image."""
    end: Decay
    """Value after decay_images images."""
    decay_images: PositiveInt
    """Training images over which the value moves."""


Probability = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class ProbabilityCosine:
    """As `Cosine`, for a probability."""

    start: Probability
    """Value before the first image."""
    end: Probability
    """Value after decay_images images."""
    decay_images: PositiveInt
    """Training images over which the value moves."""


Weight = NonNegativeFloat | Cosine
"""A weight or a length: a number, or its course over the run."""


def value_at(value: "float | Cosine | DecayCosine | ProbabilityCosine", images_seen: int) -> float:
    """A setting's value in the step that starts after ``images_seen`` images."""
    if isinstance(value, (Cosine, DecayCosine, ProbabilityCosine)):
        return value.end + (value.start - value.end) * falling(images_seen, value.decay_images)
    return value


def is_zero(value: "float | Cosine | ProbabilityCosine") -> bool:
    """Whether a weight or a probability is zero throughout the run."""
    return (value.start == value.end == 0) if isinstance(value, (Cosine, ProbabilityCosine)) else value == 0


def falling(images_seen: int, images: int) -> float:
    """Half a cosine from 1 at the first image to 0 after `images` of them, and then 0."""
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, images_seen / images)))


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam, with the same settings for generator and discriminator."""

    beta1: Decay = 0.5
    """Decay of the first moment, the moving average of the gradient."""
    beta2: Decay | DecayCosine = 0.9
    """Decay of the second moment, the moving average of the squared gradient: a number, or its course over the run.
    R3GAN lets it rise from 0.9 to 0.99."""
    eps: PositiveFloat = 1e-8
    """Term added to the square root of the second moment."""


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Learning rate of one network over the run."""

    peak: PositiveFloat = 1e-4
    """Highest learning rate of the run, reached when warm-up is over."""
    final: NonNegativeFloat = 1e-5
    """Learning rate at the last image of the run. Not used when decay is constant."""
    delay_images: NonNegativeInt = 0
    """Training images at the beginning for which the rate is 0, so that the other network learns alone: of the
    generator, where it starts from a denoiser and the discriminator from nothing."""
    warmup_images: NonNegativeInt = 0
    """Training images after delay_images over which the rate rises linearly from 0 to peak. 0: it starts at peak."""
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
    if images_seen < config.delay_images:
        return 0.0
    risen_at = config.delay_images + config.warmup_images
    if images_seen < risen_at:
        return config.peak * (images_seen - config.delay_images) / config.warmup_images
    if config.decay == "constant":
        return config.peak
    span = total_images - risen_at
    progress = min(1.0, (images_seen - risen_at) / span) if span > 0 else 1.0
    return config.final + 0.5 * (config.peak - config.final) * (1.0 + math.cos(math.pi * progress))


def ema_decay(decay: float, half_life_images: Weight | None, images_seen: int, batch_size: int) -> float:
    """Decay of the average at the update after ``images_seen`` images.

    Args:
        decay: decay per update, used without a half-life.
        half_life_images: images after which a parameter's share in the average has halved; 0: no average.
        images_seen: images trained on before this step.
        batch_size: images of a step.

    Returns:
        In [0, 1).
    """
    if half_life_images is None:
        return decay
    half_life = value_at(half_life_images, images_seen)
    return 0.5 ** (batch_size / half_life) if half_life else 0.0
