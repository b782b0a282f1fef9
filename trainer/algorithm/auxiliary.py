"""Losses of the generator and of the discriminator's predictions next to the game, and how they are weighed.

The gradient of the game can be normalized, so that weights keep their meaning however steep D is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from models.diffusion import Diffusion, step_noise
from models.discriminator import Predicted
from models.layers import is_channels_last
from models.shapes import Image, Predictions, Timestep
from trainer.algorithm.losses import Scalar, precise
from trainer.algorithm.schedules import Weight, is_zero, value_at


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Reconstruction loss of the generator, next to the adversarial loss."""

    weight: Weight = 0.0
    """Weight of the reconstruction loss in the generator's loss, a number or its course over the run: the mean distance
    of G's x0_pred from the image. It gives the generator a direction before the discriminator has learned anything.
    Later it would pull every sample to the mean of all that fit the noisy image, so let it fall to 0. 0: none, as
    published."""
    distance: Literal["square", "absolute"] = "square"
    """Distance of two pixels: the square of their difference, or its absolute value, as in WaveDiff."""


PREDICTED: dict[str, Predicted] = {"denoising": "x0", "afd_regression": "x_t"}
"""The losses of D next to the game, and what D predicts for each."""


@dataclass(frozen=True)
class Auxiliary:
    """Losses next to the game: of the generator, and of what the discriminator predicts.

    Attributes:
        reconstruction: distance of x0_pred from x0.
        transport: weight of the transport loss.
        afd: weight of the transport loss less what a regression of x_t by D leaves of it, and of that regression.
        denoising: weight of the mean square error with which D predicts x0 of real x_tm1.
        of_step: the weights of one step, by name; None: they follow their courses.
    """

    reconstruction: ReconstructionConfig = ReconstructionConfig()
    transport: Weight = 0.0
    afd: Weight = 0.0
    denoising: Weight = 0.0
    of_step: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Refuse a loss next to another that it is a part of."""
        if not is_zero(self.transport) and not is_zero(self.afd):
            raise ValueError(
                "training.transport and training.afd both have a weight, but the transport loss is a part of afd: set "
                "one of them to 0"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the losses of G that have a weight."""
        return tuple(name for name in self._weights if name not in PREDICTED)

    @property
    def names_of_d(self) -> tuple[str, ...]:
        """Names of the losses of D that have a weight."""
        return tuple(name for name in self._weights if name in PREDICTED)

    @property
    def predicts(self) -> tuple[Predicted, ...]:
        """What D has to predict, in the order of its output."""
        return tuple(PREDICTED[name] for name in self.names_of_d)

    @property
    def _weights(self) -> dict[str, Weight]:
        weights = {"reconstruction": self.reconstruction.weight, "transport": self.transport, "afd": self.afd}
        weights |= {"denoising": self.denoising, "afd_regression": self.afd}
        return {name: weight for name, weight in weights.items() if not is_zero(weight)}

    def weights_at(self, images_seen: int) -> dict[str, float]:
        """Weights by name, without those that stay 0, in the step that starts after ``images_seen`` images."""
        if self.of_step is not None:
            return dict(self.of_step)
        return {name: value_at(weight, images_seen) for name, weight in self._weights.items()}

    def at(self, images_seen: int, part: Literal["d", "g"] | None = None) -> "Auxiliary":
        """The same losses, also those whose weight has come to 0, with the weights of that step: a part's, or all."""
        weights = self.weights_at(images_seen)
        used = {"d": self.names_of_d, "g": self.names, None: tuple(weights)}[part]
        return replace(self, of_step={name: weights[name] for name in used})

    def prediction(self, name: Predicted, predictions: Predictions) -> Image:
        """One of D's predictions, in at least float32."""
        return precise(predictions[self.predicts.index(name)])


def reconstruction_loss(config: ReconstructionConfig, x0_pred: Image, x0: Image) -> Scalar:
    """Mean distance of the pixels, without the weight."""
    difference = x0_pred - x0
    return (difference.square() if config.distance == "square" else difference.abs()).mean()


def transport_loss(diffusion: Diffusion, x_tm1: Image, x_t: Image, t: Timestep) -> Scalar:
    """Mean of (x_t - sqrt(alpha) x_tm1)^2 / (2 beta) over pixels and samples: -log q(x_t | x_tm1) up to a constant.

    It ties the generated x_tm1 to its x_t where D does not see x_t (SIDDM, 2306.12511; AFM, 2511.22475). Averaged over
    real pairs it is 1/2. It has no term that holds x_tm1 back from x_t, so its weight should be small, or fall.

    Args:
        diffusion: gives alpha and beta of each step.
        x_tm1: the generated cleaner image.
        x_t: the image that it was made from.
        t: step index, 0 .. T-1.
    """
    return 0.5 * step_noise(diffusion, x_tm1, x_t, t).square().mean()


def mean_square(x: Image) -> Scalar:
    """Mean of squares over pixels and samples, in the order of memory: the gradient has the same layout."""
    return (x.permute(0, 2, 3, 1).flatten() if is_channels_last(x) else x).square().mean()


def denoising_loss(x0: Image, predicted: Image) -> Scalar:
    """Mean of (x0_from_D(x_tm1, t) - x0)^2 over pixels and samples, with which D learns to denoise (SIDDM, 2306.12511).

    Args:
        x0: the images, as D sees them.
        predicted: D's prediction from their noisy x_tm1.
    """
    return mean_square(predicted - x0)


def step_regression_loss(diffusion: Diffusion, x_tm1: Image, x_t: Image, t: Timestep, predicted: Image) -> Scalar:
    """Mean of (x_t - C(x_tm1, t))^2 / (2 beta) over pixels and samples, which the regression C of x_t minimizes.

    The network does not predict x_t itself, but the noise of the step, e: C = sqrt(alpha) x_tm1 + sqrt(beta) e. On real
    pairs the best e is 0, with which it also starts.

    Args:
        diffusion: gives alpha and beta of each step.
        x_tm1: the generated cleaner image.
        x_t: the image that it was made from.
        t: step index, 0 .. T-1.
        predicted: e, the network's output for x_tm1 and t.
    """
    return 0.5 * mean_square(predicted - step_noise(diffusion, x_tm1, x_t, t))


def afd_loss(diffusion: Diffusion, x_tm1: Image, x_t: Image, t: Timestep, predicted: Image) -> Scalar:
    """The auxiliary forward diffusion term: the transport loss less `step_regression_loss` (SIDDM, 2306.12511).

    With the best C it is the divergence of the generated p(x_t | x_tm1) from the step's q(x_t | x_tm1), as far as the
    means of x_t tell: 0 for real pairs, where the transport loss alone has its least value elsewhere. G minimizes it,
    also through C.

    Args:
        diffusion: gives alpha and beta of each step.
        x_tm1: the generated cleaner image.
        x_t: the image that it was made from.
        t: step index, 0 .. T-1.
        predicted: as of `step_regression_loss`.
    """
    transport = step_regression_loss(diffusion, x_tm1, x_t, t, torch.zeros_like(predicted))
    return transport - step_regression_loss(diffusion, x_tm1, x_t, t, predicted)


def with_gradient(x: Image, loss: Scalar, change: Callable[[Image], Image]) -> Scalar:
    """A value whose gradient with respect to `x` is that of `loss`, changed. The graph of `loss` is used up."""
    (gradient,) = torch.autograd.grad(loss, x)
    return (x * change(gradient)).sum()


class GradientScale:
    """Normalizes the gradient that the game sends to the generated images (AFM, 2511.22475).

    The gradient with respect to x_tm1 of a global batch of n values is divided by sqrt(m), where m is the moving
    average of n times its squared norm. Then it is as long as that of the mean of n values whose slopes are 1, however
    steep D is, and weights of auxiliary losses keep their meaning. m is that of the steps before; in the first step of
    a stage, which has none before it, the gradient becomes 0.

    Attributes:
        mean_square: m, float64 [], the same on all ranks.
    """

    DECAY = 0.9

    def __init__(
        self, device: torch.device | str = "cpu", total: Callable[[Tensor], Tensor] = lambda values: values
    ) -> None:
        """Start without a step.

        Args:
            device: of the gradients.
            total: sum of a tensor on `device` over the ranks, a collective.
        """
        self._total = total
        # They change in place: a recorded update reads and writes the same memory each time.
        self.mean_square, self._found = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))

    def __call__(self, gradient: Image, share: float) -> Image:
        """The normalized gradient, and take it in for the following steps.

        Args:
            gradient: of the mean loss of a micro-batch.
            share: the micro-batch's fraction of the global batch.
        """
        # In the mean over the global batch each gradient is shorter by the factor `share`, and n larger by its inverse.
        squared_norm = gradient.square().sum().to(torch.float64)
        self._found += share * gradient.numel() * squared_norm
        scale = torch.where(self.mean_square > 0, self.mean_square.rsqrt(), 0.0)
        return gradient * scale.to(gradient.dtype)

    def end_step(self, steps: int) -> None:
        """Average the norms of a step over the ranks. A collective. A norm that is not finite changes nothing.

        Args:
            steps: steps of the stage that are done.
        """
        found = self._total(self._found)
        averaged = torch.lerp(found, self.mean_square, self.DECAY)
        averaged = torch.where(self.mean_square > 0, averaged, found)
        self.mean_square.copy_(torch.where(averaged.isfinite(), averaged, self.mean_square))
        self._found.zero_()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, between steps; the same on all ranks."""
        return {"mean_square": self.mean_square}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint's state; an empty one is that of a stage's start.

        Raises:
            ValueError: it is no state of this class.
        """
        value = (state or {"mean_square": torch.zeros((), dtype=torch.float64)}).get("mean_square")
        fits = value is not None and len(state) < 2 and (value.dtype, value.ndim) == (torch.float64, 0)
        if value is None or not fits or not 0 <= value.item() < float("inf"):
            raise ValueError("its scale of the game's gradient is not valid")
        self.mean_square.copy_(value)
        self._found.zero_()
