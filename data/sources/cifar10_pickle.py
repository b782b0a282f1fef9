"""Reads the pickles of CIFAR-10 without running anything that they name.

The few names that these files need stand for small classes that only keep what they are given, so that neither a
function nor numpy itself sees a value that was not looked at; any other name is refused.
"""

import io
import math
import pickle
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt


def load_restricted(content: bytes) -> Any:
    """The object of a pickle of plain values and arrays; arrays come as `PickledArray`, strings of Python 2 as bytes.

    Raises:
        pickle.UnpicklingError: it names something that is not allowed. A damaged pickle may end in any exception.
    """
    return _RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()


def as_text(value: object) -> str:
    """A string, which is bytes where Python 2 wrote it."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class _PickledType:
    """Stands for numpy.dtype: keeps the code of the type."""

    def __init__(self, code: object = None, align: object = None, copy: object = None) -> None:
        self.code = as_text(code)

    def __setstate__(self, state: object) -> None:
        """Byte order and fields, of which one-byte numbers have none."""


class PickledArray:
    """Stands for numpy.ndarray: keeps what numpy wrote."""

    def __init__(self, *_arguments: object) -> None:
        self._state: object = None

    def __setstate__(self, state: object) -> None:
        self._state = state

    def as_uint8(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
        """The array if it is one of uint8 and of this shape, else None."""
        match self._state:
            case (_, tuple() as found, _PickledType(code="u1"), fortran, bytes() as content) if found == shape and len(
                content
            ) == math.prod(shape):
                return np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")
        return None


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes under a protocol of Python 2."""
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
