"""Ancestral sampling: T calls of the generator, from pure noise to an image (DDGAN, arXiv 2112.07804, section 3)."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.diffusion import Diffusion, sample_posterior
from models.shapes import Image, Latent


@torch.no_grad()
def sample(
    generator: Callable[[Tensor, Tensor, Tensor], Tensor],
    diffusion: Diffusion,
    *,
    noise_T: Image,
    draw: Callable[[int], tuple[Latent, Image]],
) -> Image:
    """Draw images.

    Args:
        generator: Maps (x_t, t, z) to x0_pred.
        diffusion: Tables of the process, on the device of the noise.
        noise_T: Standard normal, the image at t = T.
        draw: Gives a fresh z and a fresh posterior noise for step t; the noise of t = 0 is without effect.

    Returns:
        Images, in [-1, 1] if the generator's output is.
    """
    x_t = noise_T
    for step in reversed(range(diffusion.num_timesteps)):
        z, noise = draw(step)
        t = torch.full((len(x_t),), step, dtype=torch.int64, device=x_t.device)
        x0_pred = generator(x_t, t, z)
        x_t = sample_posterior(diffusion, x0_pred, x_t, t, noise)
    return x_t
