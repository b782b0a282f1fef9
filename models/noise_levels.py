"""Continuous noise levels: which ones a denoiser trains at, how a generator sees them, and what its output means."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from models.shapes import Image, NoiseLevel, Timestep


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """Noise levels that objective gaussian trains at."""

    kind: Literal["steps", "log_normal"] = "steps"
    """At the levels of the diffusion's steps, each as often (`steps`), or at continuous ones whose logarithm is normal
    (`log_normal`), which needs generator.time_embedding log_sigma. With log_normal the squared error is weighted by
    (sigma^2 + s^2) / (sigma s)^2, where s is generator.sigma_data or 0.5 (EDM, 2206.00364, Table 1)."""
    log_mean: Annotated[float, Field(ge=-10, le=10, description="a level of e^10 is pure noise")] = -0.4
    """With log_normal: mean of ln(sigma). EDM takes -1.2 for a sampler of many steps."""
    log_deviation: Annotated[float, Field(gt=0, le=10, description="a level of e^10 is pure noise")] = 1.6
    """With log_normal: standard deviation of ln(sigma). EDM takes 1.2 for a sampler of many steps."""
    max_weight: PositiveFloat | None = None
    """With log_normal: largest weight of a squared error. Without generator.sigma_data the weight of an image with
    little noise is not balanced by a small error. null: no limit."""


class NoiseConditioning(nn.Module):
    """The two ends of a generator, which depend on the step.

    Args:
        levels: sigma of the input of each step, 0 .. T-1. It is no part of the state: the same weights serve any steps.
        embedded: whether the time embedding takes the noise level instead of the step.
        sigma_data: standard deviation of the data for `preconditioned`; None: x0_pred is the output.
        tanh: whether the output is squashed into [-1, 1].

    Raises:
        ValueError: the settings exclude each other, or the noise levels are needed and not given.
    """

    levels: Tensor

    def __init__(self, levels: Sequence[float], *, embedded: bool, sigma_data: float | None, tanh: bool) -> None:
        super().__init__()
        if sigma_data is not None and tanh:
            raise ValueError(
                f"sigma_data is {sigma_data:g}, with which the output is weighted and added to the noisy image, but "
                "output_tanh limits it: set output_tanh to false, or sigma_data to null"
            )
        if not levels and (embedded or sigma_data is not None):
            raise ValueError("a network that sees the noise level is built with the levels of its steps")
        self.embedded, self.sigma_data, self.tanh = embedded, sigma_data, tanh
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32), persistent=False)

    def seen(self, t: Timestep | NoiseLevel) -> Timestep | NoiseLevel:
        """What the time embedding takes."""
        return self._sigma(t) if self.embedded else t

    def x0_pred(self, output: Image, x_t: Image, t: Timestep | NoiseLevel) -> Image:
        """The prediction that the network's output means."""
        if self.sigma_data is not None:
            return preconditioned(output, x_t, self._sigma(t), self.sigma_data)
        return output.tanh() if self.tanh else output

    def _sigma(self, t: Timestep | NoiseLevel) -> NoiseLevel:
        return t if t.is_floating_point() else self.levels[t]


def preconditioned(output: Image, x_t: Image, sigma: NoiseLevel, sigma_data: float) -> Image:
    """x0_pred = c_skip x + c_out F (EDM, arXiv 2206.00364, Eq. 7 and Table 1), with x = x0 + sigma n.

    The input stays x_t = x / sqrt(1 + sigma^2), which has a variance between that of the data and 1.

    Args:
        output: F, the output of the network.
        x_t: its input.
        sigma: noise level of each sample.
        sigma_data: standard deviation of the data.
    """
    sigma = sigma.view(-1, 1, 1, 1)
    variance = sigma.square() + sigma_data**2
    x = x_t * (1 + sigma.square()).sqrt()
    return sigma_data**2 / variance * x + sigma * sigma_data / variance.sqrt() * output
