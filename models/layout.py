"""The layout of feature maps in memory: channels_last on a GPU, where convolutions take no other without a copy."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether features [B, C, H, W] have the layout channels_last and no other."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def join(parts: Sequence[Tensor]) -> Float[Tensor, "b c_sum h w"]:
    """Concatenate features [B, *, H, W] along their channels, in the layout of the first.

    torch.cat takes channels_last only if all parts have it, and its second derivative never has it.
    """
    if not is_channels_last(parts[0]):
        return torch.cat(list(parts), dim=1)
    by_pixel = [part.permute(0, 2, 3, 1).flatten(1, 2) for part in parts]  # [B, H W, *]
    return torch.cat(by_pixel, dim=2).unflatten(1, parts[0].shape[2:]).permute(0, 3, 1, 2)
