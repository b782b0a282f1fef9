"""A recorder for the CPU that has the semantics of a CUDA graph: fixed memory, and numbers as they were when recorded.

While it records, it notes each operation of torch with its tensors and numbers. A replay runs the same operations on
the same tensors and copies what they return into the memory of what they returned at first. The host's code does not
run again, and work that a graph cannot hold is refused.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.rank.step.graphs import Recording

T = TypeVar("T")
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}


class _Notes(TorchDispatchMode):
    """Notes the operations that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if reason := _why_not(func, args):
            raise RuntimeError(f"{func} {reason}")
        result = func(*args, **(kwargs or {}))
        if func.namespace != "profiler":
            self.calls.append((func, *(_its_memory(x) for x in (args, kwargs or {}, result))))
        return result


class Tape:
    """Records the work of a CPU, as a `Recorder`.

    Attributes:
        recorded, replayed: how often.
    """

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def run(self, work: Callable[[], T]) -> T:
        return work()

    def record(self, work: Callable[[], T]) -> Recording[T]:
        self.recorded += 1
        with _Notes() as notes:
            result = work()

        @torch.no_grad()
        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, returned in notes.calls:
                again = func(*args, **kwargs)
                for held, value in zip(_leaves(returned), _leaves(again), strict=True):
                    if isinstance(held, Tensor) and not _shares_memory(held, value):
                        held.copy_(value)

        return Recording(result, replay)


def _why_not(func: Any, args: Sequence[Any]) -> str:
    """Why a graph cannot hold an operation; empty: it can."""
    if func is torch.ops.aten.lift_fresh.default:
        return "sends numbers to the device"
    if func in INDEXED:
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        return "needs the number of places that are not 0" if masks else ""
    waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}
    return "returns a number, or a shape, that depends on values" if waits else ""


def _its_memory(x: Any) -> Any:
    """A tensor's memory as it is now: the tensor may come to have another one, which a graph would not follow."""
    if isinstance(x, Tensor):
        return x.detach()
    # By hand: torch's trees would take longer than the operations.
    if isinstance(x, list | tuple):
        return [_its_memory(entry) for entry in x]
    return {name: _its_memory(entry) for name, entry in x.items()} if isinstance(x, dict) else x


def _leaves(returned: Any) -> Sequence[Any]:
    """The values that an operation returned, those within lists as well."""
    if not isinstance(returned, list | tuple):
        return (returned,)
    return [leaf for entry in returned for leaf in _leaves(entry)]


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    """Whether an operation returned a tensor that it was given, or a view of one: then there is nothing to copy."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
