"""Random numbers as a pure function of (seed, step, sample, purpose): Philox4x32-10 in plain torch.

No generator has a state here. Any rank can compute the draws of any sample of any step, hence a resumed run and a run
on another number of ranks see the same t, z, noises and flips. Integers are the same bit for bit on every device;
normals differ by the rounding of log, sin and cos.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); Box and Muller (1958) for normals.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Float, Int64
from torch import Tensor

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK_32 = 0xFFFFFFFF


class Purpose(IntEnum):
    """What a number is drawn for. The values are part of the format of a run: append, never renumber."""

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


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32 with ten rounds (SC 2011, section 3.3).

    Args:
        counter: four int64 tensors of broadcastable shapes, values in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        Four int64 tensors of uniform integers in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product wraps around in int64, which leaves its 64 bits right; the masks undo the sign.
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        high_0, high_1 = (product_0 >> 32) & MASK_32, (product_1 >> 32) & MASK_32
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, product_1 & MASK_32, high_0 ^ c3 ^ k1, product_0 & MASK_32
        k0, k1 = (k0 + WEYL_0) & MASK_32, (k1 + WEYL_1) & MASK_32
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Draws:
    """The random numbers of some samples in one step.

    Attributes:
        seed: of the run, in [0, 2**64).
        step: optimizer step, or number of the reverse step when sampling, in [0, 2**32).
        samples: int64 [B], each sample's position in the global batch, on the device where numbers are wanted.
    """

    seed: int
    step: int
    samples: Int64[Tensor, "b"]

    def _bits(self, purpose: Purpose, count: int) -> Tensor:
        """Uniform 32-bit integers, int64 [B, 4, ceil(count / 4)]."""
        device = self.samples.device
        block = torch.arange(-(-count // 4), device=device)
        counter = (
            block[None, :],
            self.samples[:, None],
            torch.full((1, 1), self.step, device=device),
            torch.full((1, 1), int(purpose), device=device),
        )
        return torch.stack(philox4x32(counter, (self.seed & MASK_32, self.seed >> 32)), dim=1)

    def integers(self, purpose: Purpose, high: int) -> Int64[Tensor, "b"]:
        """One uniform integer in [0, high) for each sample."""
        return (self._bits(purpose, 1)[:, 0, 0] * high) >> 32

    def normals(self, purpose: Purpose, shape: tuple[int, ...]) -> Float[Tensor, "b ..."]:
        """Standard normals, float32 [B, *shape], by Box and Muller's transform."""
        count = math.prod(shape)
        bits = self._bits(purpose, count).to(torch.float32)
        radius = (bits[:, 0::2] + 1.0).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()  # u in (0, 1]: the log is finite
        angle = bits[:, 1::2].mul_(2.0 * math.pi * 2.0**-32)
        values = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)
        return values.flatten(1)[:, :count].unflatten(1, shape)

    def flips(self) -> Tensor:
        """A fair coin for each sample, bool [B]."""
        return self.integers(Purpose.FLIP, 2).bool()


def fold_seed(seed: int, *words: int) -> int:
    """A 63-bit seed for another generator, as a pure function of a seed and words in [0, 2**32)."""
    counter = (torch.tensor([w], dtype=torch.int64) for w in (*words, 0, 0, 0, 0)[:4])
    low, high, *_ = philox4x32(tuple(counter), (seed & MASK_32, seed >> 32))  # pyright: ignore[reportArgumentType]
    return int(low) | (int(high) & 0x7FFFFFFF) << 32
