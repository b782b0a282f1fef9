"""What fused operators read from memory more than once, for whoever counts the bytes of a step."""

from collections.abc import Callable
from typing import Any

READ_AGAIN: dict[Any, Callable[..., int]] = {}
"""By operator, a function of its arguments: the bytes that its kernels read in addition to each input once."""
