"""From uint8 images to the inputs of an update: a pair of the forward process, and the noise for the fake x_tm1.

`draw_pair` is plain torch. On a GPU it is compiled into a fused pass that reads the images once and writes the pair.
Both draw the same numbers: integers bit for bit, normals up to rounding.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from models.diffusion import Diffusion, forward_pair
from models.dropout import KeepMask
from models.shapes import Condition, Image, Label, Latent, Timestep
from models.wavelets import Domain, from_pixels
from trainer.algorithm.augmentation import View
from trainer.algorithm.penalties import PenaltyDraws
from trainer.algorithm.randomness import Draws, Purpose

log = logging.getLogger(__name__)


class PairPurposes(NamedTuple):
    """The random numbers that one update's pair uses."""

    t: Purpose
    noise_tm1: Purpose
    noise_t: Purpose
    z: Purpose
    noise_posterior: Purpose
    dropout: Purpose
    label: Purpose
    condition: Purpose


FOR_D = PairPurposes(
    Purpose.D_TIMESTEP,
    Purpose.D_NOISE_TM1,
    Purpose.D_NOISE_T,
    Purpose.D_LATENT,
    Purpose.D_NOISE_POSTERIOR,
    Purpose.D_DROPOUT,
    Purpose.D_LABEL_DROPOUT,
    Purpose.D_CONDITION_DROPOUT,
)
FOR_G = PairPurposes(
    Purpose.G_TIMESTEP,
    Purpose.G_NOISE_TM1,
    Purpose.G_NOISE_T,
    Purpose.G_LATENT,
    Purpose.G_NOISE_POSTERIOR,
    Purpose.G_DROPOUT,
    Purpose.G_LABEL_DROPOUT,
    Purpose.G_CONDITION_DROPOUT,
)


@dataclass(frozen=True)
class Pair:
    """The inputs of one update for a micro-batch."""

    t: Timestep
    x_tm1: Image
    """The real, cleaner image."""
    x_t: Image
    """The noisier image, made from x_tm1."""
    z: Latent
    noise_posterior: Image
    """Noise with which the fake x_tm1 is drawn, given G's x0_pred."""
    dropout: KeepMask | None = None
    """Gives the masks of G's dropout; None: torch's own."""
    label: Label | None = None
    """Class of each image, or num_classes if it was dropped; None without classes."""
    view: View | None = None
    """The transforms through which D sees x_tm1, real and generated, x_t and the condition; None: as they are."""
    condition: Condition | None = None
    """The image that is given with each image, zero where it was dropped; None without."""

    @property
    def given(self) -> tuple[Tensor | None, ...]:
        """The last arguments of G and D: the label and, if there is one, the condition."""
        return given(self.label, self.condition)


def given(label: Label | None, condition: Condition | None) -> tuple[Tensor | None, ...]:
    """What a network gets after its images: the label and, if there is one, the condition."""
    return (label,) if condition is None else (label, condition)


@dataclass(frozen=True)
class MicroBatch:
    """Images of one forward pass of one rank, drawn for both updates.

    Attributes:
        pair_d: for the discriminator update.
        pair_g: for the generator update: fresh t, noises and z for the same images.
        share: this micro-batch's fraction of the global batch; the shares of all ranks sum to 1. It is 0 for a
            micro-batch that only pads the number of forward passes and must have no effect.
        x0: the images of both pairs, for methods that compare with them.
        penalty: what penalties by finite differences need; None in steps without them.
    """

    pair_d: Pair
    pair_g: Pair
    share: float
    x0: Image | None = None
    penalty: PenaltyDraws | None = None


@dataclass(frozen=True)
class Labels:
    """Classes of the images of a micro-batch.

    Attributes:
        of_images: 0 .. num_classes - 1, on the device of the draws.
        num_classes: number of classes, and also the value for "no label".
        dropout: probability of dropping a label.
    """

    of_images: Label
    num_classes: int
    dropout: float

    def drawn(self, draws: Draws, purpose: Purpose) -> Label:
        """The labels for one update, each dropped independently with probability `dropout`."""
        if not self.dropout:
            return self.of_images
        kept = draws.keeps(purpose, 0, (1,), self.dropout)[:, 0]
        return torch.where(kept, self.of_images, self.num_classes)


@dataclass(frozen=True)
class Conditions:
    """The images that are given with those of a micro-batch.

    Attributes:
        of_images: uint8, on the device of the draws.
        dropout: probability of dropping one.
    """

    of_images: UInt8[Tensor, "b c_given_pixels h_pixels w_pixels"]
    dropout: float

    def as_given(self, raw: "RawBatch") -> Condition:
        """The conditions of all updates, mirrored as their images are."""
        condition = to_x0(self.of_images, raw.draws.flips() if raw.flip else None, raw.domain)
        return laid_out(condition, raw.memory_format)

    def drawn(self, condition: Condition, raw: "RawBatch", purpose: Purpose) -> Condition:
        """`as_given` for one update, each condition dropped independently with probability `dropout`."""
        if not self.dropout:
            return condition
        kept = raw.draws.keeps(purpose, 0, (1,), self.dropout)
        return laid_out(torch.where(kept[:, :, None, None], condition, 0.0), raw.memory_format)


@dataclass(frozen=True)
class RawBatch:
    """Images of one forward pass of one rank, with all that a method draws from them by.

    Attributes:
        images: uint8, on the device of the draws.
        draws: random numbers of these samples.
        latent_dim: length of z.
        flip: mirror each image with probability 1/2.
        share: fraction of the global batch; 0 for a micro-batch that only pads the number of forward passes.
        labels: labels of the images; None without classes.
        memory_format: layout of the images that are drawn; see `Players`.
        start: position of the first image in the global batch.
        group_size: images of a group of the minibatch deviation; a group is never split over forward passes.
        domain: what is diffused.
        augmentation: probability of a transform, float64 [] on the device, if it is a state of the run; else None.
        conditions: the images that are given with them; None without.
    """

    images: UInt8[Tensor, "b c h w"]
    draws: Draws
    latent_dim: int
    flip: bool
    share: float
    labels: Labels | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    start: int = 0
    group_size: int = 1
    domain: Domain = "pixels"
    augmentation: Tensor | None = None
    conditions: Conditions | None = None


def draw_micro_batch(raw: RawBatch, diffusion: Diffusion, *, with_x0: bool = False) -> MicroBatch:
    """Draw a micro-batch: a pure function of images and (seed, step, sample).

    Args:
        raw: the images.
        diffusion: tables on their device.
        with_x0: keep the images as well.
    """
    images, draws = raw.images, raw.draws
    draw = pair_function(images.device.type)
    # A tensor, because with an int the compiled function would be recompiled in every step.
    step = draws.step if isinstance(draws.step, Tensor) else torch.full((), draws.step, device=images.device)
    stepped = Draws(draws.seed, step, draws.samples)

    of_images = raw.conditions.as_given(raw) if raw.conditions else None

    @torch.no_grad()
    def pair(purposes: PairPurposes) -> Pair:
        drawn = draw(images, stepped, diffusion, purposes, raw.latent_dim, raw.flip, raw.memory_format, raw.domain)
        label = raw.labels.drawn(draws, purposes.label) if raw.labels else None
        condition = None
        if raw.conditions and of_images is not None:
            condition = raw.conditions.drawn(of_images, raw, purposes.condition)
        return Pair(*drawn, dropout=partial(draws.keeps, purposes.dropout), label=label, condition=condition)

    x0 = None
    if with_x0:
        x0 = laid_out(to_x0(images, draws.flips() if raw.flip else None, raw.domain), raw.memory_format)
    return MicroBatch(pair(FOR_D), pair(FOR_G), raw.share, x0)


DrawnPair = tuple[Timestep, Image, Image, Latent, Image]
"""t, x_tm1, x_t, z and the posterior's noise."""


def draw_pair(
    images: UInt8[Tensor, "b c_pixels h_pixels w_pixels"],
    draws: Draws,
    diffusion: Diffusion,
    purposes: PairPurposes,
    latent_dim: int,
    flip: bool,
    memory_format: torch.memory_format = torch.contiguous_format,
    domain: Domain = "pixels",
) -> DrawnPair:
    """Draw t, x_tm1, x_t, z and the posterior's noise for one update, in plain torch."""
    t = draws.integers(purposes.t, diffusion.num_timesteps)
    x0 = to_x0(images, draws.flips() if flip else None, domain)
    shape = tuple(x0.shape[1:])
    noise_tm1, noise_t = draws.normals(purposes.noise_tm1, shape), draws.normals(purposes.noise_t, shape)
    z, noise_posterior = draws.normals(purposes.z, (latent_dim,)), draws.normals(purposes.noise_posterior, shape)
    pair = (*forward_pair(diffusion, x0, t, noise_tm1, noise_t), noise_posterior)
    x_tm1, x_t, noise_posterior = (laid_out(x, memory_format) for x in pair)
    return t, x_tm1, x_t, z, noise_posterior


def laid_out(x: Float[Tensor, "b c h w"], memory_format: torch.memory_format) -> Float[Tensor, "b c h w"]:
    """The same images in a layout, a copy only if their pixels have to move."""
    if memory_format != torch.channels_last:
        return x.contiguous(memory_format=memory_format)
    # Images of one channel are contiguous in both layouts, and torch tells them apart by their strides alone.
    B, C, H, W = x.shape
    return x.permute(0, 2, 3, 1).flatten().view(B, H, W, C).permute(0, 3, 1, 2)


def to_x0(
    images: UInt8[Tensor, "b c_pixels h_pixels w_pixels"], flips: Bool[Tensor, " b"] | None, domain: Domain = "pixels"
) -> Float[Tensor, "b c h w"]:
    """Convert uint8 images to contiguous float32 in [-1, 1], mirrored where `flips` is True, in a domain."""
    x0 = images.contiguous()  # they come in the decoder's layout, channels last
    if flips is not None:
        x0 = torch.where(flips[:, None, None, None], x0.flip(-1), x0)
    return from_pixels(x0.to(torch.float32) / 127.5 - 1.0, domain)


DrawPair = Callable[..., DrawnPair]
"""`draw_pair`, or a compiled form of it."""


@cache
def pair_function(device_type: str) -> DrawPair:
    """`draw_pair` for a device type: compiled on a GPU with Triton, otherwise unchanged.

    TORCH_COMPILE_DISABLE=1 in the environment disables compilation.
    """
    if device_type != "cuda" or find_spec("triton") is None:
        return draw_pair
    # Fixed shapes: the result then depends only on the current micro-batch size, not on sizes seen earlier.
    return checked(torch.compile(draw_pair, dynamic=False))


def checked(compiled: DrawPair) -> DrawPair:
    """`compiled` if its first call gives the same result as `draw_pair`, otherwise `draw_pair`.

    A machine may lack the tools that Triton needs to build kernels, and compilers have produced wrong integers. Each
    shape and each purpose has its own kernel, so each is checked.
    """
    chosen: dict[Any, DrawPair] = {}
    warned: set[str] = set()

    def draw(*arguments: Any) -> DrawnPair:
        images, _, _, *fixed = arguments
        kernel = (images.shape, images.stride(), *fixed)
        if kernel in chosen:
            return chosen[kernel](*arguments)
        expected = draw_pair(*arguments)
        try:
            drawn = compiled(*arguments)
            torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)  # t must be equal, normals up to rounding
        except Exception as error:  # compilers fail in many ways
            reason = str(error).strip().partition("\n")[0]
            if reason not in warned:
                log.warning("the fused pass cannot be used (%s): pairs are drawn by plain torch, more slowly", reason)
            warned.add(reason)
            chosen[kernel] = draw_pair
            return expected
        chosen[kernel] = compiled
        return drawn

    return draw
