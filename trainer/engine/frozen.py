"""Frozen parameters: they get no gradient and no optimizer state, and engines save their values alone."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits one of the patterns, in which `*` stands for any characters, dots included."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def freeze(module: nn.Module, part: str, patterns: Sequence[str]) -> None:
    """Freeze parameters; call it before the optimizer and the engine are made.

    Args:
        module: a network.
        part: what its parameters' names in the patterns begin with: generator or discriminator.
        patterns: of these names; those of other networks have no effect.
    """
    for name, p in module.named_parameters():
        if matches(f"{part}.{name}", patterns):
            p.requires_grad_(False)


def learning(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [p for p in module.parameters() if p.requires_grad]


@contextmanager
def all_frozen(module: nn.Module) -> Iterator[None]:
    """Inside, no parameter of `module` needs a gradient, so none is computed and no engine hook fires for them."""
    parameters = learning(module)
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
