"""Sampling: T calls of the generator, from pure noise to an image (DDGAN, arXiv 2112.07804, section 3)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from models.diffusion import Diffusion, deterministic_step, sample_posterior
from models.shapes import Image, Latent

Sampler = Literal["ancestral", "deterministic"]


@torch.no_grad()
def sample(
    generator: Callable[[Tensor, Tensor, Tensor], Tensor],
    diffusion: Diffusion,
    *,
    noise_T: Image,
    draw: Callable[[int], tuple[Latent, Image]],
    sampler: Sampler = "ancestral",
) -> Image:
    """Draw images.

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
        t = torch.full((len(x_t),), step, dtype=torch.int64, device=x_t.device)
        x0_pred = generator(x_t, t, z)
        if sampler == "deterministic":
            x_t = deterministic_step(diffusion, x0_pred, x_t, t)
        else:
            x_t = sample_posterior(diffusion, x0_pred, x_t, t, noise)
    return x_t
