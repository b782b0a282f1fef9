"""An operator in two forms, fused and plain, and the choice between them.

The fused form is checked against the plain one on random numbers, once for each combination of shapes and dtypes on a
GPU. A machine may lack the tools that Triton needs, and compilers make mistakes. If the check fails, one line is logged
and the plain form is used. The result depends on nothing but shapes and machine, so all ranks choose alike.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Where = Literal["nowhere", "gpu", "everywhere"]
MAX_CHANNELS = 4096
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 2**-6}
"""Largest error of the fused form, relative to the largest value. On a GPU the plain form may use TF32, hence 2e-3."""
_where: Where = "gpu"


def fuse(where: Where) -> None:
    """Use fused operators on GPUs (the default), nowhere, or everywhere, as for counting work on the meta device."""
    global _where
    _where = where


@contextmanager
def fused(where: Where) -> Iterator[None]:
    """`fuse` inside the context."""
    before = _where
    fuse(where)
    try:
        yield
    finally:
        fuse(before)


def can_fuse(x: Tensor) -> bool:
    """Whether fused operators are to be used for features x, and have kernels for its dtype, layout and size."""
    return (
        not torch.compiler.is_compiling()  # the compiler fuses plain operations, and these with their neighbours
        and _where != "nowhere"
        and (x.is_cuda or _where == "everywhere")
        and x.dim() == 4
        and x.dtype in TOLERANCES
        and 0 < x.shape[1] <= MAX_CHANNELS
        and 0 < x.numel() < len(x) * 2**29  # 32-bit offsets within a sample, also of its double
        and x.is_contiguous(memory_format=torch.channels_last)
        and (not x.is_cuda or has_triton())
    )


@cache
def has_triton() -> bool:
    """Whether Triton is installed; builds of torch for GPUs bring it."""
    return find_spec("triton") is not None


class Operator:
    """An operator on features x: fused if `can_fuse` and the check allow it, otherwise plain.

    Args:
        name: what messages call it.
        fused: the fused form.
        plain: the plain form, with the same arguments and result: a tensor, or several.
    """

    def __init__(self, name: str, fused: Callable[..., Any], plain: Callable[..., Any]) -> None:
        self.name = name
        self.fused = fused
        self.plain = plain
        self._chosen: dict[Any, Callable[..., Any]] = {}

    def __call__(self, x: Tensor, *others: Any) -> Any:
        """Apply the form that was chosen for these shapes."""
        if not can_fuse(x):
            return self.plain(x, *others)
        if not x.is_cuda:
            return self.fused(x, *others)
        key = tuple((a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in (x, *others))
        if key not in self._chosen:
            self._chosen[key] = self.checked(x, *others)
        return self._chosen[key](x, *others)

    def checked(self, *arguments: Any) -> Callable[..., Any]:
        """The fused form if it agrees with the plain one for such arguments, forward and backward."""
        try:
            error, allowed = self.error(*arguments)
            if error <= allowed:
                return self.fused
            reason = f"its error is {error:.2g}, more than {allowed:.2g}"
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # compilers fail in many ways
            reason = str(failure).strip().partition("\n")[0] or type(failure).__name__
        _warn(self.name, reason)
        return self.plain

    def error(self, *arguments: Any) -> tuple[float, float]:
        """Largest relative error of result and gradients for random numbers in place of `arguments`, and its limit."""
        device = arguments[0].device
        generator = torch.Generator(device).manual_seed(0)

        def drawn(like: Tensor) -> Tensor:
            return torch.empty_like(like).normal_(generator=generator)

        results: list[list[Tensor]] = []
        grads: list[Tensor] = []
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            tensors = [drawn(a) if isinstance(a, Tensor) else None for a in arguments]
            for form, dtype in ((self.fused, None), (self.plain, torch.float32)):
                inputs = [t if t is None else t.to(dtype or t.dtype).detach().requires_grad_() for t in tensors]
                y = form(*(a if t is None else t for a, t in zip(arguments, inputs, strict=True)))
                ys = [y] if isinstance(y, Tensor) else list(y)
                grads = grads or [drawn(y) for y in ys]
                given = [grad.to(y.dtype) for grad, y in zip(grads, ys, strict=True)]
                results.append([*ys, *torch.autograd.grad(ys, [t for t in inputs if t is not None], given)])
        errors = [_relative_error(ours, theirs) for ours, theirs in zip(*results, strict=True)]
        return max(errors), max(TOLERANCES[t.dtype] for t in tensors if t is not None)


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        raise ValueError(f"shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
    ours, theirs = ours.detach().float(), theirs.detach()
    error = (ours - theirs).abs().max() / theirs.abs().max()
    return float(error.nan_to_num(nan=float("inf")))  # so that not-a-number passes no limit


@cache
def _warn(name: str, reason: str) -> None:
    log.warning("the fused %s cannot be used (%s): plain torch computes it, more slowly", name, reason)
