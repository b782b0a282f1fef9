"""Minibatch standard deviation (ProGAN, arXiv 1710.10196, section 3): shows the discriminator how samples differ.

`contiguous` groups are neighbours in the batch, so a rank's share of a global batch holds whole groups and the result
does not depend on the number of ranks. `strided` is the published grouping: sample i with i + B/group, i + 2B/group ...
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from models.layers import is_channels_last, join
from models.shapes import Features

Grouping = Literal["contiguous", "strided"]


def check_batch_size(batch_size: int, group_size: int) -> None:
    """Check that a batch splits into groups of min(batch_size, group_size).

    Raises:
        ValueError: It does not.
    """
    if batch_size % min(batch_size, group_size):
        raise ValueError(
            f"a batch of {batch_size} images cannot be split into groups of stddev_group_size {group_size}: the number "
            f"of images in one forward pass must be a multiple of {group_size}, or smaller. Change the micro batch "
            "size or discriminator.stddev_group_size"
        )


def append_deviation(x: Features, group_size: int, grouping: Grouping) -> Float[Tensor, "b c+1 h w"]:
    """Append one constant channel: the standard deviation over the sample's group, averaged over all features.

    It is computed in at least float32 whatever the dtype of x; autocast lowers none of these operations.

    Args:
        x: Features.
        group_size: Samples per group; a smaller batch is one group.
        grouping: Which samples of the batch form a group.

    Raises:
        ValueError: The batch cannot be split into such groups.
    """
    B, _, H, W = x.shape
    check_batch_size(B, group_size)
    group = min(B, group_size)
    members = 1 if grouping == "contiguous" else 0
    shape = (B // group, group) if grouping == "contiguous" else (group, B // group)
    # In the order of its memory, so that the gradient comes in the same layout.
    features = x.permute(0, 2, 3, 1).flatten(1) if is_channels_last(x) else x
    groups = features.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, shape)
    deviation = (groups.var(dim=members, correction=0) + 1e-8).sqrt()
    deviation = deviation.mean(dim=tuple(range(1, deviation.dim())))  # [B / group]
    of_sample = deviation.unsqueeze(members).expand(shape).reshape(B, 1, 1, 1)
    return join([x, of_sample.to(x.dtype).expand(B, 1, H, W)])
