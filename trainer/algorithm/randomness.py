"""Random numbers as a pure function of (seed, step, sample, purpose): Philox4x32-10 in plain torch.

There is no generator state. Any rank can compute the numbers of any sample in any step, so a resumed run, or a run with
another number of ranks, gets the same t, z, noises, flips and masks. Integers are bit-identical on every device;
normals differ by the rounding of log, sin and cos.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Box and Muller (1958) for normals.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK_32 = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a random number is used for. The values are part of a run's format: append new ones, never renumber."""

    FLIP = 0
    D_TIMESTEP = 1
    D_NOISE_TM1 = 2
    D_NOISE_T = 3
    D_LATENT = 4
    D_NOISE_POSTERIOR = 5
    G_TIMESTEP = 6
    G_NOISE_TM1 = 7
    G_NOISE_T = 8
    G_LATENT = 9
    G_NOISE_POSTERIOR = 10
    SAMPLE_NOISE_T = 11
    SAMPLE_LATENT = 12
    SAMPLE_NOISE_POSTERIOR = 13
    D_DROPOUT = 14
    G_DROPOUT = 15
    D_LABEL_DROPOUT = 16
    G_LABEL_DROPOUT = 17
    D_PENALTY_REAL = 18
    D_PENALTY_FAKE = 19
    G_NOISE_LEVEL = 20
    D_AUGMENT_FLIP = 21
    D_AUGMENT_SHIFT = 22
    D_AUGMENT_CUTOUT = 23
    G_AUGMENT_FLIP = 24
    G_AUGMENT_SHIFT = 25
    G_AUGMENT_CUTOUT = 26
    EDIT_NOISE_START = 27
    EDIT_NOISE_KNOWN = 28
    EDIT_NOISE_BACK = 29
    D_CONDITION_DROPOUT = 30
    G_CONDITION_DROPOUT = 31


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Philox4x32 with ten rounds (SC 2011, section 3.3).

    Args:
        counter: four int64 tensors of broadcastable shapes, values in [0, 2**32).
        key: two integers in [0, 2**32), also as int64 [].

    Returns:
        Four int64 tensors of uniform integers in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product needs 64 unsigned bits. Subtracting 2**32 * counter makes it fit into int64; the counter is added
        # back to the high word. An int64 overflow is undefined in C++, and compiled code did produce wrong numbers.
        product_0, product_1 = c0 * (MULTIPLIER_0 - 2**32), c2 * (MULTIPLIER_1 - 2**32)
        high_0, high_1 = (product_0 >> 32) + c0, (product_1 >> 32) + c2
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, product_1 & MASK_32, high_0 ^ c3 ^ k1, product_0 & MASK_32
        k0, k1 = (k0 + WEYL_0) & MASK_32, (k1 + WEYL_1) & MASK_32
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Draws:
    """The random numbers of given samples in one step.

    Attributes:
        seed: seed of the run or of the samples, in [0, 2**64); or int64 [] in [0, 2**63), where it is an exported
            program's argument; or int64 [B], one for each sample.
        step: optimizer step, or number of the reverse step when sampling, in [0, 2**32); an int, or an int64 tensor
            with one element on the device of the samples.
        samples: int64 [B], each sample's position in the global batch, on the device where the numbers are needed.
    """

    seed: int | Tensor
    step: int | Tensor
    samples: Int64[Tensor, " b"]

    def _words(self, purpose: Purpose, block: Tensor, layer: int = 0) -> tuple[Tensor, ...]:
        """Four uniform 32-bit integers, each int64 [B, N], for each sample and each entry of `block` [1 or B, N]."""
        device = self.samples.device
        counter = (
            block,
            self.samples[:, None],
            self.step.view(1, 1) if isinstance(self.step, Tensor) else torch.full((1, 1), self.step, device=device),
            torch.full((1, 1), int(purpose) | layer << 16, device=device),
        )
        seed = self.seed.view(-1, 1) if isinstance(self.seed, Tensor) else self.seed  # [1 or B, 1]
        return philox4x32(counter, (seed & MASK_32, seed >> 32))

    def words(self, purpose: Purpose) -> Int64[Tensor, "b 4"]:
        """Four uniform integers in [0, 2**32) for each sample."""
        block = torch.zeros(1, 1, dtype=torch.int64, device=self.samples.device)
        return torch.cat(self._words(purpose, block), dim=1)

    def integers(self, purpose: Purpose, high: int) -> Int64[Tensor, " b"]:
        """One uniform integer in [0, high) for each sample."""
        block = torch.zeros(1, 1, dtype=torch.int64, device=self.samples.device)
        return (self._words(purpose, block)[0][:, 0] * high) >> 32

    def normals(self, purpose: Purpose, shape: tuple[int, ...]) -> Float[Tensor, "b ..."]:
        """Standard normals, float32 [B, *shape], by the Box-Muller transform."""
        count = math.prod(shape)
        num_blocks = -(-count // 4)
        # The four normals of block i have the positions i, num_blocks + i, 2 num_blocks + i and 3 num_blocks + i.
        if torch.compiler.is_compiling():
            # In a fused pass, computing each block four times is cheaper than concatenating its normals.
            number = torch.arange(count, device=self.samples.device)
            # The xor with zero forces int64: otherwise the compiler multiplies a 32-bit index, which overflows.
            block = (number % num_blocks) ^ (self.samples[:, None] >> 63)
            words = self._words(purpose, block)
            quarter = number // num_blocks
            first = quarter % 2 == 0
            radius, angle = _polar(torch.where(first, words[0], words[2]), torch.where(first, words[1], words[3]))
            values = radius * torch.where(quarter < 2, angle.cos(), angle.sin())
        else:
            block = torch.arange(num_blocks, device=self.samples.device)[None]
            words = torch.stack(self._words(purpose, block), dim=1)
            radius, angle = _polar(words[:, 0::2], words[:, 1::2])
            values = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1).flatten(1)[:, :count]
        return values.unflatten(1, shape)

    def keeps(self, purpose: Purpose, layer: int, shape: tuple[int, ...], probability: float) -> Bool[Tensor, "b ..."]:
        """Masks of a dropout layer, bool [B, *shape]: False with `probability`; `layer` counts from 0."""
        count = math.prod(shape)
        block = torch.arange(-(-count // 4), device=self.samples.device)[None]
        # Comparing integers makes the masks bit-identical on every device.
        keep = torch.cat(self._words(purpose, block, layer), dim=1)[:, :count] >= round(probability * 2**32)
        return keep.unflatten(1, shape)

    def flips(self) -> Bool[Tensor, " b"]:
        """A fair coin flip for each sample, bool [B]."""
        return self.integers(Purpose.FLIP, 2).bool()


def _polar(radius_bits: Tensor, angle_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Radius and angle of the Box-Muller transform, float32, from uniform 32-bit integers."""
    u = (radius_bits.to(torch.float32) + 1.0) * 2.0**-32  # in (0, 1]: the logarithm is finite
    return (u.log() * -2.0).sqrt(), angle_bits.to(torch.float32) * (2.0 * math.pi * 2.0**-32)


def fold_seed(seed: int, *words: int) -> int:
    """A 63-bit seed for another generator: a pure function of a seed and up to four words in [0, 2**32)."""
    counter = (torch.tensor([w], dtype=torch.int64) for w in (*words, 0, 0, 0, 0)[:4])
    low, high, *_ = philox4x32(tuple(counter), (seed & MASK_32, seed >> 32))  # pyright: ignore[reportArgumentType]
    return int(low) | (int(high) & 0x7FFFFFFF) << 32
