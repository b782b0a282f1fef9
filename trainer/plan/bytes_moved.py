"""The bytes that operations read from memory and write to it, counted one operation at a time.

Every operation reads each of its input tensors once and writes each of its outputs once. An operation in place does
both with its tensor, and a view moves nothing. Caches are not considered, nor what a library's kernel copies on its
own. An operator that is registered with `torch.library` is one operation; what its kernels read again is counted if
the operator says so in `READ_AGAIN`.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from models.fused.traffic import READ_AGAIN

Kind = Literal[
    "convolution", "matmul", "norm", "activation", "elementwise", "cast", "copy", "fir", "fused", "draw", "optimizer",
    "average", "other",
]  # fmt: skip
KINDS: dict[Kind, str] = {
    "convolution": "convolutions",
    "matmul": "matrix products, attention",
    "norm": "norms",
    "activation": "activations",
    "elementwise": "additions, products",
    "cast": "casts",
    "copy": "copies, concatenations",
    "fir": "FIR filters",
    "fused": "fused operators",
    "other": "sums and others",
    "draw": "draws of the pairs",
    "optimizer": "optimizer",
    "average": "moving average",
}
"""What each kind contains, in the order of a table."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OF_KIND: dict[Kind, frozenset[str]] = {
    "convolution": frozenset({"convolution", "convolution_backward"}),
    "matmul": _names("mm addmm bmm baddbmm mv dot"),
    "activation": _names(
        "silu silu_ silu_backward leaky_relu leaky_relu_ leaky_relu_backward tanh tanh_ tanh_backward sigmoid "
        "sigmoid_backward softplus softplus_backward"
    ),
    "copy": _names("clone copy_ cat stack contiguous slice_backward select_backward constant_pad_nd"),
    "elementwise": _names(
        "add add_ sub sub_ rsub mul mul_ div div_ addcmul addcmul_ addcdiv addcdiv_ lerp lerp_ neg where pow "
        "sqrt rsqrt reciprocal sin cos exp log square threshold_backward"
    ),
}
_ALLOCATES = _names("empty empty_like empty_strided new_empty new_empty_strided")
_ONLY_SHAPE = _names("zeros_like ones_like full_like rand_like new_zeros new_ones new_full fill_ zero_")
"""Functions that read nothing of the tensor that they are given."""
_VIEWS = _names("_unsafe_view _reshape_alias detach alias lift_fresh")
"""Functions that move nothing, in addition to those that torch marks as views."""


@dataclass
class Moved:
    """What a group of operations does.

    Attributes:
        read, written: bytes.
        num_operations: how many operations there are; each is about one kernel.
        flops: FLOPs of convolutions and matrix products, by the dtype of their factors.
    """

    read: float = 0.0
    written: float = 0.0
    num_operations: float = 0.0
    flops: dict[torch.dtype, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def total(self) -> float:
        """Bytes read and written."""
        return self.read + self.written

    def add(self, other: "Moved", factor: float = 1.0) -> None:
        """Add another group, times a factor."""
        self.read += factor * other.read
        self.written += factor * other.written
        self.num_operations += factor * other.num_operations
        for dtype, flops in other.flops.items():
            self.flops[dtype] += factor * flops


Traffic = Mapping[Kind, Moved]
"""What the operations of each kind do."""


def weighted(*parts: tuple[float, Traffic]) -> dict[Kind, Moved]:
    """The sum of several traffics, each times its factor."""
    total: dict[Kind, Moved] = {kind: Moved() for kind in KINDS}
    for factor, traffic in parts:
        for kind, moved in traffic.items():
            total[kind].add(moved, factor)
    return total


def total_bytes(traffic: Traffic) -> float:
    """Bytes of all kinds."""
    return sum(moved.total for moved in traffic.values())


class ByteCounter(TorchDispatchMode):
    """Inside, every operation is counted in `traffic`."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic: dict[Kind, Moved] = {kind: Moved() for kind in KINDS}
        self._part: Kind | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        out = _as_on_a_gpu(name, args, func(*args, **kwargs))
        if func.is_view or name in _VIEWS or name in _ALLOCATES:
            return out
        moved = self.traffic[self._part or _kind(func, name, args, out)]
        moved.num_operations += 1
        given = _tensors((args, kwargs))
        made = [tensor for key, tensor in _tensors(out).items() if key not in given]
        if name not in _ONLY_SHAPE:
            unread = _tensors(args[0] if name == "copy_" else kwargs.get("out"))
            moved.read += sum(_nbytes(tensor) for key, tensor in given.items() if key not in unread)
        if func.overloadpacket in READ_AGAIN:
            moved.read += READ_AGAIN[func.overloadpacket](*args, **kwargs)
        moved.written += sum(map(_nbytes, (*made, *_changed(func, args, kwargs))))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            moved.flops[next(iter(given.values())).dtype] += formula(*args, **kwargs, out_val=out)
        return out

    @contextmanager
    def all_as(self, kind: Kind) -> Iterator[None]:
        """Inside, all operations are counted as one kind."""
        before, self._part = self._part, kind
        try:
            yield
        finally:
            self._part = before

    def count(self, kind: Kind, read: float, written: float) -> None:
        """Count one operation that does not run."""
        self.traffic[kind].add(Moved(read, written, 1.0))


def _as_on_a_gpu(name: str, args: Any, out: Any) -> Any:
    """The results of a convolution in channels_last, if a GPU gave them so: the meta device forgets the layout."""
    if name == "convolution" and any(map(_is_channels_last, args[:2])):
        return out.contiguous(memory_format=torch.channels_last)
    if name == "convolution_backward" and any(map(_is_channels_last, args[:3])):
        return tuple(
            grad.contiguous(memory_format=torch.channels_last) if grad is not None and grad.dim() == 4 else grad
            for grad in out
        )
    return out


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _kind(func: Any, name: str, args: Any, out: Any) -> Kind:
    """What an operation belongs to, by its name; a filter is a convolution of each channel by itself."""
    if func.namespace not in ("aten", "prims", "prim"):
        return "fused"
    if name.startswith("convolution"):
        groups = args[-2] if name == "convolution_backward" else args[8]
        return "fir" if groups > 1 else "convolution"
    if "group_norm" in name or "layer_norm" in name:
        return "norm"
    if "scaled_dot_product" in name:
        return "matmul"
    if name == "_to_copy":
        return "cast" if out.dtype != args[0].dtype else "copy"
    for kind, names in _OF_KIND.items():
        if name in names:
            return kind
    return "other"


def _tensors(tree: Any) -> dict[int, Tensor]:
    """The tensors in a tree of arguments, each once."""
    return {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def _changed(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation writes in place."""
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments]
    by_name = {argument.name: is_written for argument, is_written in zip(func._schema.arguments, written, strict=True)}
    places = [value for value, is_written in zip(args, written, strict=False) if is_written]
    places += [value for name, value in kwargs.items() if by_name.get(name)]
    return list(_tensors(places).values())


def _nbytes(tensor: Tensor) -> int:
    """Bytes of the elements in memory; those of an expanded tensor are there once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride or not length else 1
    return size
