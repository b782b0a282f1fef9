"""Dropout whose masks the caller can supply, so that a resumed run draws the same masks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
"""Maps (layer number, shape of one sample's features, drop probability) to the layer's mask: bool [B, *shape], True
where a feature is kept."""


class Dropout(nn.Module):
    """In training, drops each feature with `probability` and divides the others by 1 - `probability`.

    Inside `masks_from` the masks come from the caller, otherwise from torch's global generator.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.keep: Callable[[tuple[int, ...], float], Tensor] | None = None

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Drop features of x; the identity in evaluation mode."""
        if not self.training or self.probability == 0:
            return x
        if self.keep is None:
            return F.dropout(x, self.probability)
        keep = self.keep(tuple(x.shape[1:]), self.probability)
        return torch.where(keep, x / (1 - self.probability), x.new_zeros(()))


def draws_masks(module: nn.Module) -> bool:
    """Whether a forward pass of `module` now draws masks from torch's global generator."""
    return any(isinstance(m, Dropout) and m.training and m.probability and m.keep is None for m in module.modules())


def same_masks(module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """A context in which `module` takes its masks from where it takes them now: for the same forward pass again."""
    sources = [(layer, layer.keep) for layer in module.modules() if isinstance(layer, Dropout)]

    @contextmanager
    def again() -> Iterator[None]:
        present = [layer.keep for layer, _ in sources]
        for layer, keep in sources:
            layer.keep = keep
        try:
            yield
        finally:
            for (layer, _), keep in zip(sources, present, strict=True):
                layer.keep = keep

    return again


@contextmanager
def masks_from(module: nn.Module, keep: KeepMask | None) -> Iterator[None]:
    """Inside, forward passes of `module` take their masks from `keep`; layers are numbered in the order of modules."""
    layers = [m for m in module.modules() if isinstance(m, Dropout)] if keep else []
    for number, layer in enumerate(layers):
        layer.keep = partial(keep, number) if keep else None
    try:
        yield
    finally:
        for layer in layers:
            layer.keep = None
