"""Reads the pickles of CIFAR-10 without running anything that they name.

The few names in these files map to small classes that only store their arguments, so that neither a function nor numpy
gets an unchecked value. Any other name is refused.
"""

import io
import math
import pickle
import struct
from typing import Any, ClassVar, NoReturn

import numpy as np
import numpy.typing as npt


def load_restricted(content: bytes) -> Any:
    """Load a pickle of plain values and arrays. Arrays become `PickledArray`, Python 2 strings become bytes.

    The memory that this takes is bounded by the size of the content.

    Raises:
        pickle.UnpicklingError: it names or does something that is not allowed. A damaged pickle may raise any
            exception.
    """
    try:
        return _RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()
    except (EOFError, IndexError, struct.error):
        raise pickle.UnpicklingError("it is cut off, or damaged") from None


def as_text(value: object) -> str:
    """Convert a string; Python 2 strings are bytes. Anything else becomes the name of its type."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    # Not `str`: nested tuples may share their parts, and their text would have no bound.
    return value if isinstance(value, str) else type(value).__name__


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


# The unpickler in C gives its table of repeated objects as many places as a number in the file says. The one in Python
# has a dictionary.
_Unpickler: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]


class _RestrictedUnpickler(_Unpickler):
    dispatch: ClassVar[dict[int, Any]] = dict(_Unpickler.dispatch)

    def _refuse(self) -> NoReturn:
        raise pickle.UnpicklingError("it uses an operation that these files do not need")

    def load_build(self) -> None:
        """Set the state of an object, which must be one of ours."""
        if not isinstance(self.stack[-2], PickledArray | _PickledType):
            self._refuse()
        super().load_build()

    def load_setitem(self) -> None:
        """Set an item of a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        """Set items of a dictionary."""
        self._set_items(self.pop_mark())

    def _set_items(self, items: list[Any]) -> None:
        # The hash of nested tuples that share their parts may take forever.
        if not isinstance(self.stack[-1], dict) or not all(isinstance(key, bytes | str) for key in items[::2]):
            self._refuse()
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    # Sets, and dictionaries made at once, would hash their keys too. A byte array has the size that a number says.
    _refused = (pickle.DICT, pickle.EMPTY_SET, pickle.FROZENSET, pickle.ADDITEMS, pickle.BYTEARRAY8)
    dispatch |= dict.fromkeys((code[0] for code in _refused), _refuse)

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {name}, which is not allowed and was not run")
        return _ALLOWED[name]

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside the file")
