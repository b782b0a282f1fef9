"""Dropout whose masks may come from outside, so that a run can decide them by itself and draw them again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

DropProbability = Annotated[float, Field(ge=0, lt=1)]
"""Probability of dropping something; at 1 nothing would be left."""


KeepMask = Callable[[int, tuple[int, ...], float], Tensor]
"""Gives the mask of a layer, bool [B, *shape], True where a feature stays: from the layer's number, the shape of one
sample's features and the probability of dropping."""


class Dropout(nn.Module):
    """In training, drops each feature with a probability and divides the others by the probability of staying.

    The masks are those of `masks_from` around the forward pass, or else torch's, from its global generator.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.keep: Callable[[tuple[int, ...], float], Tensor] | None = None

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Drop features of x, in training only."""
        if not self.training or self.probability == 0:
            return x
        if self.keep is None:
            return F.dropout(x, self.probability)
        keep = self.keep(tuple(x.shape[1:]), self.probability)
        return torch.where(keep, x / (1 - self.probability), x.new_zeros(()))


@contextmanager
def masks_from(module: nn.Module, keep: KeepMask | None) -> Iterator[None]:
    """Take the masks of one forward pass of `module` from `keep`; its layers are numbered in the order of modules."""
    layers = [m for m in module.modules() if isinstance(m, Dropout)] if keep else []
    for number, layer in enumerate(layers):
        layer.keep = partial(keep, number) if keep else None
    try:
        yield
    finally:
        for layer in layers:
            layer.keep = None
