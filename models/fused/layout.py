"""How kernels see a tensor: in channels_last, by tiles of pixels and channels."""

import torch
from torch import Tensor

TILE = 4096
"""Elements of a tile: 32 for each of 128 threads."""


def channels_last(x: Tensor) -> Tensor:
    """x in channels_last; a copy only if it has another layout."""
    return x.contiguous(memory_format=torch.channels_last)


def tile_of(num_channels: int, elements: int = TILE) -> dict[str, int]:
    """Pixels and channels of a tile, which holds all channels."""
    block_c = power_of_two(num_channels)
    return {"BLOCK_P": max(1, elements // block_c), "BLOCK_C": block_c}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
