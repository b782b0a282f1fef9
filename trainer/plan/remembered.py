"""The meta device with a memory: what an operation returns is computed once for arguments of the same kind.

PyTorch computes the shape of most results on the meta device in Python, and the blocks of a network repeat the same few
operations. Inside `RememberedResults` a counted step takes half of the time.
"""

from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_Form = tuple[torch.Size, tuple[int, ...], torch.dtype] | None
"""Shape, strides and type of a result; None for one that an operation leaves out."""


class RememberedResults(TorchDispatchMode):
    """Inside, an operation on the meta device that returns new tensors only computes their form once.

    Views, operations in place, and those with tensors of other devices run as they would without it. The memory is that
    of the process: a preset plans the same networks several times.
    """

    _forms: ClassVar[dict[Hashable, tuple[bool, list[_Form]]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run or remember one operation."""
        kwargs = kwargs or {}
        if not _returns_new_tensors(func):
            return func(*args, **kwargs)
        try:
            key = func, _kind(args), _kind(tuple(kwargs.items()))
        except _NotRememberedError:
            return func(*args, **kwargs)
        if key not in self._forms:
            result = func(*args, **kwargs)
            if all(r is None or r.is_meta for r in _several(result)):  # not so of what is made on the CPU
                self._forms[key] = isinstance(result, tuple), [_form(r) for r in _several(result)]
            return result
        several, forms = self._forms[key]
        made = [form and torch.empty_strided(form[0], form[1], dtype=form[2], device="meta") for form in forms]
        return tuple(made) if several else made[0]


class _NotRememberedError(Exception):
    """An argument decides more than the form of the result."""


_NEW: dict[Any, bool] = {}


def _returns_new_tensors(func: Any) -> bool:
    if func not in _NEW:
        schema = func._schema
        _NEW[func] = not schema.is_mutable and all(
            returned.alias_info is None and isinstance(returned.type, torch.TensorType) for returned in schema.returns
        )
    return _NEW[func]


def _kind(value: Any) -> Hashable:
    """What decides the form of a result: of a tensor not its values, of a number its type as well."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise _NotRememberedError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    if isinstance(value, dict | set):
        raise _NotRememberedError
    return type(value), value


def _several(result: Tensor | tuple[Tensor | None, ...] | None) -> tuple[Tensor | None, ...]:
    return result if isinstance(result, tuple) else (result,)


def _form(result: Tensor | None) -> _Form:
    return result if result is None else (result.shape, result.stride(), result.dtype)
