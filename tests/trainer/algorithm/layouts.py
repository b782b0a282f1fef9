"""Counts what happens to feature maps that are not in channels_last, and what the host sends to a device."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
COPIES = (aten.clone.default, aten._to_copy.default, aten.copy_.default)


def is_map(x: Any) -> bool:
    """Whether x is a feature map, whose layout matters: a vector or an image of one channel has both layouts."""
    return isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1


def is_last(x: Tensor) -> bool:
    """Whether the channels of x are next to each other in memory; slices and broadcast maps count by their order."""
    _, channel, row, column = x.stride()
    return 0 in x.stride() or channel <= column <= row


class Layouts(TorchDispatchMode):
    """Counts operations on feature maps while it is entered.

    Attributes:
        copies: copies from one layout to another, by operation and shape.
        others: other operations with an argument or a result that is not in channels_last, likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.others: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        maps = [x for x in tree_leaves((args, kwargs, out)) if is_map(x)]
        wrong = [x for x in maps if not is_last(x)]
        if wrong and not func.is_view:
            counter = self.copies if func in COPIES else self.others
            counter[str(func), tuple(wrong[0].shape)] += 1
        return out
