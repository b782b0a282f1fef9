"""From uint8 images to what an update sees of them: a pair of the forward process, and the noise that makes the fake.

`draw_pair` is plain torch. On a GPU it is compiled into a fused pass that reads the images once and writes the pair;
what it draws is the same, bit for bit the integers and to rounding the normals.
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
from models.shapes import Image, Label, Latent, Timestep
from trainer.algorithm.randomness import Draws, Purpose

log = logging.getLogger(__name__)


class PairPurposes(NamedTuple):
    """Which draws make the pair of one update."""

    t: Purpose
    noise_tm1: Purpose
    noise_t: Purpose
    z: Purpose
    noise_posterior: Purpose
    dropout: Purpose
    label: Purpose


FOR_D = PairPurposes(
    Purpose.D_TIMESTEP,
    Purpose.D_NOISE_TM1,
    Purpose.D_NOISE_T,
    Purpose.D_LATENT,
    Purpose.D_NOISE_POSTERIOR,
    Purpose.D_DROPOUT,
    Purpose.D_LABEL_DROPOUT,
)


FOR_G = PairPurposes(
    Purpose.G_TIMESTEP,
    Purpose.G_NOISE_TM1,
    Purpose.G_NOISE_T,
    Purpose.G_LATENT,
    Purpose.G_NOISE_POSTERIOR,
    Purpose.G_DROPOUT,
    Purpose.G_LABEL_DROPOUT,
)


@dataclass(frozen=True)
class Pair:
    """What one update sees of a micro-batch."""

    t: Timestep
    x_tm1: Image
    """Real, the cleaner one."""
    x_t: Image
    """Made from x_tm1, the noisier one."""
    z: Latent
    noise_posterior: Image
    """Makes the fake x_tm1 from G's x0_pred."""
    dropout: KeepMask | None = None
    """Gives the masks of G's dropout; None: torch's."""
    label: Label | None = None
    """Class of each image, or num_classes where it was dropped; None without classes."""


@dataclass(frozen=True)
class MicroBatch:
    """Images of one forward pass of one rank, drawn for both updates.

    Attributes:
        pair_d: of the discriminator update.
        pair_g: of the generator update: fresh t, noises and z for the same images.
        share: this micro-batch's part of the global batch; the shares of all ranks sum to 1. It is 0 for one that only
            fills up the number of forward passes: it must leave no trace.
    """

    pair_d: Pair
    pair_g: Pair
    share: float


def draw_micro_batch(
    images: UInt8[Tensor, "b c h w"],
    draws: Draws,
    diffusion: Diffusion,
    *,
    latent_dim: int,
    flip: bool,
    share: float,
    labels: "Labels | None" = None,
) -> MicroBatch:
    """A micro-batch, a pure function of images and (seed, step, sample).

    Args:
        images: on the device of the draws.
        draws: of these samples.
        diffusion: tables on the same device.
        latent_dim: length of z.
        flip: mirror each image or not, by its own coin.
        share: of the global batch.
        labels: of the images; None without classes.
    """
    draw = pair_function(images.device.type)
    # A tensor, or the compiled function would be compiled for each step anew.
    step = draws.step if isinstance(draws.step, Tensor) else torch.full((), draws.step, device=images.device)
    stepped = Draws(draws.seed, step, draws.samples)

    @torch.no_grad()
    def pair(purposes: PairPurposes) -> Pair:
        drawn = draw(images, stepped, diffusion, purposes, latent_dim, flip)
        label = labels.drawn(draws, purposes.label) if labels else None
        return Pair(*drawn, dropout=partial(draws.keeps, purposes.dropout), label=label)

    return MicroBatch(pair(FOR_D), pair(FOR_G), share)


@dataclass(frozen=True)
class Labels:
    """Classes of the images of a micro-batch.

    Attributes:
        of_images: 0 .. num_classes - 1, on the device of the draws.
        num_classes: stands for "no label" too.
        dropout: probability with which a label is dropped.
    """

    of_images: Label
    num_classes: int
    dropout: float

    def drawn(self, draws: Draws, purpose: Purpose) -> Label:
        """What an update sees: each label, or none, by a coin of its own."""
        if not self.dropout:
            return self.of_images
        kept = draws.keeps(purpose, 0, (1,), self.dropout)[:, 0]
        return torch.where(kept, self.of_images, self.num_classes)


DrawnPair = tuple[Timestep, Image, Image, Latent, Image]
"""t, x_tm1, x_t, z and the posterior's noise."""


def draw_pair(
    images: UInt8[Tensor, "b c h w"],
    draws: Draws,
    diffusion: Diffusion,
    purposes: PairPurposes,
    latent_dim: int,
    flip: bool,
) -> DrawnPair:
    """t, x_tm1, x_t, z and the posterior's noise for one update; plain torch."""
    shape = tuple(images.shape[1:])
    t = draws.integers(purposes.t, diffusion.num_timesteps)
    x0 = to_x0(images, draws.flips() if flip else None)
    noise_tm1, noise_t = draws.normals(purposes.noise_tm1, shape), draws.normals(purposes.noise_t, shape)
    x_tm1, x_t = forward_pair(diffusion, x0, t, noise_tm1, noise_t)
    return t, x_tm1, x_t, draws.normals(purposes.z, (latent_dim,)), draws.normals(purposes.noise_posterior, shape)


def to_x0(images: UInt8[Tensor, "b c h w"], flips: Bool[Tensor, " b"] | None) -> Float[Tensor, "b c h w"]:
    """uint8 images, mirrored where `flips` says so, as contiguous float32 in [-1, 1]."""
    x0 = images.contiguous()  # they come in the decoder's layout, channels last
    if flips is not None:
        x0 = torch.where(flips[:, None, None, None], x0.flip(-1), x0)
    return x0.to(torch.float32) / 127.5 - 1.0


DrawPair = Callable[[Tensor, Draws, Diffusion, PairPurposes, int, bool], DrawnPair]


@cache
def pair_function(device_type: str) -> DrawPair:
    """`draw_pair` for a type of device: compiled on a GPU that Triton serves, else as it is.

    TORCH_COMPILE_DISABLE=1 in the environment leaves it as it is everywhere.
    """
    if device_type != "cuda" or find_spec("triton") is None:
        return draw_pair
    # Of fixed shapes: what is drawn then depends on the size of the micro-batch alone, not on the sizes met before.
    return checked(torch.compile(draw_pair, dynamic=False))


def checked(compiled: DrawPair) -> DrawPair:
    """`compiled`, if it draws what `draw_pair` draws when it is first called, else `draw_pair`.

    A machine may lack what Triton builds its kernels with, and compilers have been seen to get integers wrong. For each
    shape and each purpose another kernel is built, and so looked at.
    """
    chosen: dict[Any, DrawPair] = {}
    told: set[str] = set()

    def draw(*arguments: Any) -> DrawnPair:
        images, _, _, *fixed = arguments
        kernel = (images.shape, images.stride(), *fixed)
        if kernel in chosen:
            return chosen[kernel](*arguments)
        expected = draw_pair(*arguments)
        try:
            found = compiled(*arguments)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # t must be equal, normals to rounding
        except Exception as error:  # compilers fail in many ways
            reason = str(error).strip().partition("\n")[0]
            if reason not in told:
                log.warning("pairs are drawn by plain torch, slower: the fused pass cannot be used (%s)", reason)
            told.add(reason)
            chosen[kernel] = draw_pair
            return expected
        chosen[kernel] = compiled
        return found

    return draw
