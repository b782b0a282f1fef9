"""Images made from given ones: noised to a step of the diffusion, and denoised from there (SDEdit, 2108.01073).

What must stay of an image is the part that a projector P keeps: known pixels, the grey values, or the means of blocks.
After each step that part is replaced by that of the given image at the same noise level, x <- x + P(y - x). With jumps
back (RePaint, 2201.09865) a step is done several times, noise in between, so that the free part fits the kept one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
from trainer.sample.draw import NEEDS_CONDITIONS, images_at_once
from trainer.sample.images import to_uint8
from trainer.sample.tiles import in_tiles

Keep = Callable[[Image], Image]
"""A linear projector on images in pixels: the part of an image that stays."""
Way = Literal["stroke", "variations", "mask", "colorize", "upscale"]
"""The ways of editing: from a drawing, like the given image, or keeping known pixels, grey values or block means."""


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


def edit_of(
    way: Way,
    config: TrainConfig,
    label: int | None,
    *,
    factor: int = 1,
    start: int | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> Edit:
    """What a way of editing does to images of a run; for `mask`, `keep` is left to the caller, who has the mask.

    Args:
        way: of editing.
        config: the run's config.
        label: class of the results.
        factor: side of the blocks whose means `upscale` keeps, in pixels.
        start, repeats, seed: as in `Edit`; start None: half of the steps for `stroke` and `variations`, which nothing
            but the start ties to the given image, otherwise all.

    Raises:
        UserError: the run draws no such images, or has no such class or step.
    """
    size, channels, T = config.data.image_size, config.image_form.channels, config.diffusion.num_timesteps
    if config.data.condition_channels:
        raise UserError(NEEDS_CONDITIONS)
    if config.image_form.is_point:
        raise UserError("this run draws points in the plane, not images")
    if way == "colorize" and channels == 1:
        raise UserError("this run draws grey images, and invents no colours")
    if way == "upscale" and not 2 <= factor <= size:
        raise UserError(f"upscale is {factor}; allowed: 2 to the image size {size}")
    if size % factor:
        raise UserError(f"upscale is {factor}, which does not divide the image size {size}")
    check_label(label, config.data.num_classes)
    is_free = way in ("stroke", "variations")
    first = (max(1, T // 2) if is_free else T) if start is None else start
    if not 1 <= first <= T:
        raise UserError(f"the start step is {first}, but this model has the steps 1 to {T}")
    if first == T and is_free:
        more = "take a smaller start step" if T > 1 else "a model of one step cannot do that"
        raise UserError(f"noised to step {T} of {T}, nothing is left of the image: {more}")
    keep = {"colorize": grey_values, "upscale": block_means(factor)}.get(way)
    return Edit(start=first, keep=keep, repeats=repeats, seed=seed)


def check_label(label: int | None, num_classes: int) -> None:
    """Raise UserError unless a label is a class of a model, or None for one without classes."""
    if num_classes and label is None:
        raise UserError(f"a class is missing: this run has the classes 0 to {num_classes - 1}, and a result is of one")
    if label is not None and label >= num_classes:
        allowed = f"0 to {num_classes - 1}" if num_classes else "none, this run has no classes"
        raise UserError(f"the class is {label}; allowed: {allowed}")


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

    With images larger than the run's, the generator sees tiles of them; see `trainer.sample.tiles`.

    Args:
        generator: in evaluation mode, on the device of the images.
        diffusion: tables on the same device.
        config: the run's config.
        edit: what to do, from a step that the diffusion has.
        given: pixels in [-1, 1], float32, of the channels of the run, and of its size or larger.
        samples: a number for each result, which keys its noise.
        label: classes of the results; only with classes.
    """
    T, domain, size = diffusion.num_timesteps, config.data.domain, config.network_form.size
    method, y = make_method(config.training, config.generator), from_pixels(given, domain)
    is_larger = max(y.shape[2:]) > size
    generate = in_tiles(generator, size, images_at_once(config.data.image_size)) if is_larger else generator
    arguments = {} if label is None else {"label": label}
    predictor = method.x0_predictor(lambda x_t, t, z: generate(x_t, t, z, **arguments), diffusion)

    def normals(step: int, purpose: Purpose, shape: tuple[int, ...] = tuple(y.shape[1:])) -> Tensor:
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
