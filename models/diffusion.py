"""The forward process with few large steps, its Gaussian posterior, and sampling (DDGAN, arXiv 2112.07804, section 3).

`x0` is data; `x_t` is the noisier and `x_tm1` the cleaner image of a step. `t` is 0 .. T-1, and t = 0 is the paper's
step 1: x_tm1 at t = 0 is x0 itself, and x_t at t = T-1 is nearly pure noise. (The authors' code says x_tp1 and x_t.)
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat
from torch import Tensor

from models.shapes import Image, Latent, NoiseLevel, Timestep

# The published schedules run over [1e-3, 1]. Starting at time 0 would give the first step no noise to start from.
FIRST_TIME = 1e-3
Sampler = Literal["ancestral", "deterministic"]
Level = Annotated[float, Field(gt=0, le=1000, description="above, float32 keeps nothing of the image")]


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The forward process: number of steps and noise schedule."""

    num_timesteps: Annotated[int, Field(gt=0, le=100_000, description="published processes have up to 4,000 steps")] = 4
    """Number T of denoising steps that make an image from noise. The paper tries 1, 2, 4 and 8."""
    schedule: Literal["vp", "geometric", "levels"] = "vp"
    """How the noise grows: as in the variance preserving SDE (`vp`), by a constant factor of its variance at every
    step (`geometric`), or through the levels that are given (`levels`)."""
    beta_min: PositiveFloat = 0.1
    """Start of the schedule: rate of the SDE with `vp`, noise variance with `geometric`."""
    beta_max: Annotated[float, Field(gt=0, le=1000, description="above, float64 keeps nothing of the image")] = 20.0
    """End of the schedule, in the unit of beta_min and above it; below 1 with `geometric`."""
    levels: Annotated[tuple[Level, ...], Field(min_length=1, max_length=1000)] | None = None
    """With schedule levels: the noise level of each of the num_timesteps images after x0, from the cleanest to the
    noisiest. A level is sigma, the standard deviation of the noise divided by the factor of the image. Sampling starts
    from pure noise as if the last level were infinite: give at least 40 for images in [-1, 1]."""

    def __post_init__(self) -> None:
        if self.levels is not None or self.schedule == "levels":
            self._check_levels()
        if self.beta_min >= self.beta_max:
            raise ValueError(
                f"beta_min is {self.beta_min} and beta_max is {self.beta_max}, but the noise has to grow: "
                "set beta_min below beta_max"
            )
        if self.schedule == "geometric" and self.beta_max >= 1:
            raise ValueError(
                f"beta_max is {self.beta_max}, but it is the geometric schedule's final noise variance and must be "
                "below 1: set beta_min and beta_max to variances such as 0.01 and 0.99, or set schedule to vp"
            )

    def _check_levels(self) -> None:
        if self.schedule != "levels":
            raise ValueError(
                f"levels are given, but schedule is {self.schedule}, which has its own: set schedule to levels, or "
                "levels to null"
            )
        if self.levels is None:
            raise ValueError(
                f"schedule is levels, but levels is null: give num_timesteps ({self.num_timesteps}) levels of noise, "
                "such as [0.4, 1.2, 4, 80] for four"
            )
        if len(self.levels) != self.num_timesteps:
            raise ValueError(
                f"levels has {len(self.levels)} entries, but num_timesteps is {self.num_timesteps}: give one level for "
                "each step"
            )
        if any(after <= before for before, after in pairwise(self.levels)):
            raise ValueError(
                f"levels is {list(self.levels)}, but the noise has to grow: sort them, each above the one before it"
            )


def step_betas(config: DiffusionConfig) -> Float[Tensor, " steps"]:
    """Noise variance beta of each step, float64, from alpha_bar: at given levels, or at the ends of T equal times."""
    if config.levels is not None:
        sigma = torch.tensor([0.0, *config.levels], dtype=torch.float64)
        return 1 - (1 + sigma[:-1] ** 2) / (1 + sigma[1:] ** 2)  # alpha_bar = 1 / (1 + sigma^2)
    T = config.num_timesteps
    time = torch.arange(T + 1, dtype=torch.float64) / T * (1 - FIRST_TIME) + FIRST_TIME
    if config.schedule == "vp":
        slope = config.beta_max - config.beta_min
        alpha_bar = torch.exp(2 * (-0.25 * time**2 * slope - 0.5 * time * config.beta_min))
    else:
        alpha_bar = 1 - config.beta_min * (config.beta_max / config.beta_min) ** time
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


@dataclass(frozen=True, kw_only=True)
class Diffusion:
    """Float32 tables of the process. Forward tables are indexed by image, 0 .. T; posterior tables by t, 0 .. T-1."""

    sqrt_alpha: Float[Tensor, " images"]
    """Factor of image i-1 in image i; entry 0 is 1."""
    sigma: Float[Tensor, " images"]
    """Standard deviation of the noise added by the step to image i."""
    sqrt_alpha_bar: Float[Tensor, " images"]
    """Factor of x0 in image i."""
    sqrt_one_minus_alpha_bar: Float[Tensor, " images"]
    """Standard deviation of the noise in image i; entry 0 is 0."""
    posterior_coef_x0: Float[Tensor, " steps"]
    """Weight of x0 in the mean of q(x_tm1 | x_t, x0)."""
    posterior_coef_xt: Float[Tensor, " steps"]
    """Weight of x_t in that mean; entry 0 is 0."""
    posterior_variance: Float[Tensor, " steps"]
    """Variance of q(x_tm1 | x_t, x0); entry 0 is 0."""

    @staticmethod
    def from_config(config: DiffusionConfig, device: torch.device | str = "cpu") -> "Diffusion":
        """Build the tables of a schedule on the CPU, so that they are the same bits on every device."""
        # After the betas, everything is float32, products included, as in the published code. 1 - alpha_bar of an early
        # step differs from its float64 value by up to 1e-6.
        beta = step_betas(config).float()
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)
        alpha_bar_prev = torch.cat([torch.ones(1), alpha_bar[:-1]])
        # Image 0 is the data: beta = 1e-8 leaves alpha = 1 in float32.
        forward_beta = torch.cat([torch.tensor([1e-8]), beta])
        forward_alpha = 1 - forward_beta
        forward_alpha_bar = forward_alpha.cumprod(0)
        return Diffusion(
            sqrt_alpha=forward_alpha.sqrt(),
            sigma=forward_beta.sqrt(),
            sqrt_alpha_bar=forward_alpha_bar.sqrt(),
            sqrt_one_minus_alpha_bar=(1 - forward_alpha_bar).sqrt(),
            posterior_coef_x0=beta * alpha_bar_prev.sqrt() / (1 - alpha_bar),
            posterior_coef_xt=(1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar),
            posterior_variance=beta * (1 - alpha_bar_prev) / (1 - alpha_bar),
        ).to(device)

    @property
    def num_timesteps(self) -> int:
        """Number T of steps."""
        return len(self.posterior_variance)

    @property
    def noise_levels(self) -> Float[Tensor, " steps"]:
        """Sigma of the images 1 .. T: the noise's standard deviation divided by the factor of x0 (EDM, 2206.00364)."""
        return (self.sqrt_one_minus_alpha_bar / self.sqrt_alpha_bar)[1:]

    def to(self, device: torch.device | str) -> "Diffusion":
        """The same tables on another device."""
        return Diffusion(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def forward_pair(diffusion: Diffusion, x0: Image, t: Timestep, noise_tm1: Image, noise_t: Image) -> tuple[Image, Image]:
    """Draw (x_tm1, x_t) from the forward process given x0, DDGAN (2112.07804) Eq. 1.

    Args:
        diffusion: Tables of the process.
        x0: Data in [-1, 1].
        t: Step index of each sample, 0 .. T-1.
        noise_tm1: Standard normal, turns x0 into x_tm1. Has no effect at t = 0, where x_tm1 is x0.
        noise_t: Standard normal, turns x_tm1 into x_t.

    Returns:
        x_tm1 ~ q(x_tm1 | x0) and x_t ~ q(x_t | x_tm1).
    """
    x_tm1 = _at(diffusion.sqrt_alpha_bar, t) * x0 + _at(diffusion.sqrt_one_minus_alpha_bar, t) * noise_tm1
    return x_tm1, noisier(diffusion, x_tm1, t, noise_t)


def noisy(diffusion: Diffusion, x0: Image, t: Timestep, noise: Image) -> Image:
    """Draw x_t ~ q(x_t | x0), DDPM (2006.11239) Eq. 4: the input of denoising step t."""
    return _at(diffusion.sqrt_alpha_bar, t + 1) * x0 + _at(diffusion.sqrt_one_minus_alpha_bar, t + 1) * noise


def noisy_image(diffusion: Diffusion, x0: Image, number: int, noise: Image) -> Image:
    """Draw image `number` of the process, 0 .. T, where image 0 is x0 itself."""
    t = torch.full((len(x0),), number - 1, dtype=torch.int64, device=x0.device)
    return noisy(diffusion, x0, t, noise)


def noisier(diffusion: Diffusion, x_tm1: Image, t: Timestep, noise: Image) -> Image:
    """Draw x_t ~ q(x_t | x_tm1), one step of the forward process."""
    return _at(diffusion.sqrt_alpha, t + 1) * x_tm1 + _at(diffusion.sigma, t + 1) * noise


def noisy_at(sigma: NoiseLevel, x0: Image, noise: Image) -> Image:
    """x_t at any noise level: (x0 + sigma n) / sqrt(1 + sigma^2), as `noisy` makes it at the level of a step."""
    sigma = sigma.view(-1, 1, 1, 1)
    return (x0 + sigma * noise) / (1 + sigma.square()).sqrt()


def step_noise(diffusion: Diffusion, x_tm1: Image, x_t: Image, t: Timestep) -> Image:
    """The noise with which step t turns x_tm1 into x_t; for pairs of the forward process it is standard normal."""
    return (x_t - _at(diffusion.sqrt_alpha, t + 1) * x_tm1) / _at(diffusion.sigma, t + 1)


def nearest_step(diffusion: Diffusion, log_sigma: NoiseLevel) -> Timestep:
    """The step whose input has the nearest noise level by its logarithm."""
    levels = diffusion.noise_levels.log()
    return torch.bucketize(log_sigma, (levels[1:] + levels[:-1]) / 2)


def noise_in(diffusion: Diffusion, x_t: Image, x0: Image, t: Timestep) -> Image:
    """The noise with which `noisy` turns x0 into x_t."""
    return (x_t - _at(diffusion.sqrt_alpha_bar, t + 1) * x0) / _at(diffusion.sqrt_one_minus_alpha_bar, t + 1)


def x0_without(diffusion: Diffusion, x_t: Image, noise: Image, t: Timestep) -> Image:
    """The x0 that `noisy` turns into x_t with this noise, DDPM (2006.11239) Eq. 15."""
    return (x_t - _at(diffusion.sqrt_one_minus_alpha_bar, t + 1) * noise) / _at(diffusion.sqrt_alpha_bar, t + 1)


def deterministic_step(diffusion: Diffusion, x0_pred: Image, x_t: Image, t: Timestep) -> Image:
    """x_tm1 with the same noise as x_t, DDIM (2010.02502) Eq. 12 at sigma = 0; at t = 0 it is x0_pred."""
    noise = noise_in(diffusion, x_t, x0_pred, t)
    return _at(diffusion.sqrt_alpha_bar, t) * x0_pred + _at(diffusion.sqrt_one_minus_alpha_bar, t) * noise


def posterior_mean(diffusion: Diffusion, x0_pred: Image, x_t: Image, t: Timestep) -> Image:
    """Mean of q(x_tm1 | x_t, x0), DDPM (2006.11239) Eq. 7; at t = 0 it is x0_pred."""
    return _at(diffusion.posterior_coef_x0, t) * x0_pred + _at(diffusion.posterior_coef_xt, t) * x_t


def sample_posterior(diffusion: Diffusion, x0_pred: Image, x_t: Image, t: Timestep, noise: Image) -> Image:
    """Draw x_tm1 ~ q(x_tm1 | x_t, x0_pred), DDGAN (2112.07804) Eq. 5; the variance at t = 0 is zero."""
    return posterior_mean(diffusion, x0_pred, x_t, t) + _at(diffusion.posterior_variance.sqrt(), t) * noise


@torch.no_grad()
def sample(
    generator: Callable[[Tensor, Tensor, Tensor], Tensor],
    diffusion: Diffusion,
    *,
    noise_T: Image,
    draw: Callable[[int], tuple[Latent, Image]],
    sampler: Sampler = "ancestral",
) -> Image:
    """Draw images by T calls of the generator, from pure noise on.

    Args:
        generator: Maps (x_t, t, z) to x0_pred.
        diffusion: Tables of the process, on the device of the noise.
        noise_T: Standard normal, the image at t = T.
        draw: Returns a fresh z and a fresh posterior noise for step t; the noise has no effect at t = 0.
        sampler: `ancestral` draws from the posterior; `deterministic` (DDIM) reuses the noise that x0_pred implies in
            x_t. A generator trained with the adversarial method supports only `ancestral`.

    Returns:
        Images, in [-1, 1] if the generator's output is.
    """
    x_t = noise_T
    for step in reversed(range(diffusion.num_timesteps)):
        z, noise = draw(step)
        t = torch.full((x_t.shape[0],), step, dtype=torch.int64, device=x_t.device)
        x0_pred = generator(x_t, t, z)
        if sampler == "deterministic":
            x_t = deterministic_step(diffusion, x0_pred, x_t, t)
        else:
            x_t = sample_posterior(diffusion, x0_pred, x_t, t, noise)
    return x_t


def _at(table: Float[Tensor, " entries"], index: Timestep) -> Float[Tensor, "b 1 1 1"]:
    """One entry per sample, shaped to broadcast over images."""
    return table[index].view(-1, 1, 1, 1)
