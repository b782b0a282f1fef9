"""Images made from given ones: noised to a step of the diffusion, and denoised from there (SDEdit, 2108.01073).

What must stay of an image is the part that a projector P keeps: known pixels, the grey values, or the means of blocks.
After each step that part is replaced by that of the given image at the same noise level, x <- x + P(y - x). With jumps
back (RePaint, 2201.09865) a step is done several times, noise in between, so that the free part fits the kept one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from data.storage.errors import UserError
from models.diffusion import Diffusion, noisier, noisy_image, sample_posterior
from models.shapes import Image, Label, Uint8Image
from models.wavelets import from_pixels, to_pixels
from trainer.algorithm.methods import make_method
from trainer.algorithm.randomness import Draws, Purpose
from trainer.config.train_config import TrainConfig
from trainer.sample.draw import NEEDS_CONDITIONS
from trainer.sample.images import to_uint8

Keep = Callable[[Image], Image]
"""A linear projector on images in pixels: the part of an image that stays."""


def known_pixels(mask: Float[Tensor, "b 1 h w"]) -> Keep:
    """Keep the pixels at which the mask, 0 or 1, is 1."""
    return lambda x: mask * x


def grey_values(x: Image) -> Image:
    """Keep the mean of the channels of each pixel."""
    return x.mean(dim=1, keepdim=True).expand_as(x)


def block_means(factor: int) -> Keep:
    """Keep the mean of each block of factor x factor pixels."""
    return lambda x: F.interpolate(F.avg_pool2d(x, factor), scale_factor=float(factor), mode="nearest")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What is done to images.

    Attributes:
        start: number of the noisy image to start from, 1 .. T; at T the given image leaves no trace but what is kept.
        keep: what stays; None: nothing.
        repeats: how often each step is done.
        seed: seed of all noise.
    """

    start: int
    keep: Keep | None = None
    repeats: int = 1
    seed: int = 0


@torch.no_grad()
def edited(
    generator: nn.Module,
    diffusion: Diffusion,
    config: TrainConfig,
    edit: Edit,
    given: Image,
    samples: Int64[Tensor, " b"],
    label: Label | None = None,
) -> Uint8Image:
    """One result for each given image, uint8 [B, C, H, W]: a function of weights, seed, image and number.

    Args:
        generator: in evaluation mode, on the device of the images.
        diffusion: tables on the same device.
        config: the run's config.
        edit: what to do.
        given: pixels in [-1, 1], float32, of the size and channels of the run.
        samples: a number for each result, which keys its noise.
        label: classes of the results; only with classes.

    Raises:
        UserError: the diffusion has no such step.
    """
    T, domain, shape = diffusion.num_timesteps, config.data.domain, config.network_form.shape
    if config.data.condition_channels:
        raise UserError(NEEDS_CONDITIONS)
    if not 1 <= edit.start <= T:
        raise UserError(f"--start-step is {edit.start}, but this model has the steps 1 to {T}")
    method, y = make_method(config.training, config.generator), from_pixels(given, domain)
    arguments = {} if label is None else {"label": label}
    predictor = method.x0_predictor(lambda x_t, t, z: generator(x_t, t, z, **arguments), diffusion)

    def normals(step: int, purpose: Purpose, shape: tuple[int, ...] = shape) -> Tensor:
        return Draws(edit.seed, step, samples).normals(purpose, shape)

    if edit.start == T:
        x = normals(T, Purpose.SAMPLE_NOISE_T)  # as in sampling, though a trace of the image would be left
    else:
        x = noisy_image(diffusion, y, edit.start, normals(edit.start, Purpose.EDIT_NOISE_START))
    for step in reversed(range(edit.start)):
        t = torch.full((len(given),), step, dtype=torch.int64, device=given.device)
        for turn in range(edit.repeats):
            key = step + T * turn  # the first turn draws what sampling draws
            z = normals(key, Purpose.SAMPLE_LATENT, (config.generator.latent_dim,))
            x_t = x if turn == 0 else noisier(diffusion, x, t, normals(key, Purpose.EDIT_NOISE_BACK))
            x0_pred = predictor(x_t, t, z)
            x = sample_posterior(diffusion, x0_pred, x_t, t, normals(key, Purpose.SAMPLE_NOISE_POSTERIOR))
            if edit.keep is not None:
                there = noisy_image(diffusion, y, step, normals(key, Purpose.EDIT_NOISE_KNOWN))
                x = x + from_pixels(edit.keep(to_pixels(there, domain) - to_pixels(x, domain)), domain)
    return to_uint8(to_pixels(x, domain))
