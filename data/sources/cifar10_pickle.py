"""Reads the pickles of CIFAR-10 without running anything that they name.

The few names in these files map to small classes that only store their arguments, so that neither a function nor numpy
gets an unchecked value. Any other name is refused.
"""

import io
import math
import pickle
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt


def load_restricted(content: bytes) -> Any:
    """Load a pickle of plain values and arrays. Arrays become `PickledArray`, Python 2 strings become bytes.

    Raises:
        pickle.UnpicklingError: it names something that is not allowed. A damaged pickle may raise any exception.
    """
    return _RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()


def as_text(value: object) -> str:
    """Convert to a string; Python 2 strings are bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _PickledType:
    """Replaces numpy.dtype: stores the type code."""

    def __init__(self, code: object = None, align: object = None, copy: object = None) -> None:
        self.code = as_text(code)

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and fields: one-byte numbers have none."""


class PickledArray:
    """Replaces numpy.ndarray: stores what numpy wrote."""

    def __init__(self, *_arguments: object) -> None:
        self._state: object = None

    def __setstate__(self, state: object) -> None:
        self._state = state

    def as_uint8(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
        """The array if it is uint8 and has this shape, else None."""
        match self._state:
            case (_, tuple() as found, _PickledType(code="u1"), fortran, bytes() as content) if found == shape and len(
                content
            ) == math.prod(shape):
                return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")
        return None


def _encode(text: str, encoding: str) -> bytes:
    """Replaces _codecs.encode, which Python 2 protocols use for bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for encoding {encoding!r}, allowed is latin1")
    return text.encode("latin1")


_ALLOWED = {
    "numpy.core.multiarray._reconstruct": PickledArray,
    "numpy._core.multiarray._reconstruct": PickledArray,
    "numpy.ndarray": PickledArray,
    "numpy.dtype": _PickledType,
    "_codecs.encode": _encode,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {name}, which is not allowed and was not run")
        return _ALLOWED[name]

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside the file")
