"""Work of the device that repeats: recorded once as a CUDA graph, and from then on replayed by one launch.

A replay runs the same kernels with the same numbers on the same memory, without the host's part of the work. So it does
what the work would do if the work reads and writes the same tensors each time, changes them in place, and all numbers
that the host computes for it are the same. `Repeated` compares these numbers.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from data.storage.errors import OperationError

log = logging.getLogger(__name__)
T = TypeVar("T")

WARM_UP = 3
"""Times that work is done before it is recorded, so that kernels are chosen and states made: as torch recommends."""


class RecordingError(OperationError):
    """Work cannot be recorded; the message says why."""


@dataclass(frozen=True)
class Recording(Generic[T]):
    """Recorded work.

    Attributes:
        result: what it returned. Each replay writes new values into its tensors.
        replay: does the work again.
    """

    result: T
    replay: Callable[[], None]


@runtime_checkable
class Recorder(Protocol):
    """Records what a device does."""

    def run(self, work: Callable[[], T]) -> T:
        """Do some work without recording it, where it will later be recorded."""
        ...

    def record(self, work: Callable[[], T]) -> Recording[T]:
        """Do some work once, and record it.

        Raises:
            RecordingError: it cannot be recorded, because it waits for the device, for example.
        """
        ...


class CudaGraphs:
    """Records CUDA graphs, each with its own memory.

    Graphs that share memory would have to be replayed in the order in which they were recorded.
    """

    def __init__(self, device: torch.device) -> None:
        # A graph cannot be captured on the default stream, and libraries prepare their work for each stream.
        self._device, self._stream = device, torch.cuda.Stream(device)

    def run(self, work: Callable[[], T]) -> T:
        """As `Recorder.run`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], T]) -> Recording[T]:
        """As `Recorder.record`."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads pin memory for batches and copy checkpoints meanwhile, which only this one may not.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                result = work()
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise RecordingError(f"{reason}: set engine.cuda_graphs to false") from error
        graph.replay()  # what is captured is not done yet
        return Recording(result, graph.replay)


def recorder_for(device: torch.device, world_size: int) -> Recorder | None:
    """What records a rank's updates with engine.cuda_graphs; None, with a line in the log, where they are not recorded.

    Args:
        device: of the rank.
        world_size: number of ranks.
    """
    reason = None
    if device.type != "cuda":
        reason = "it needs a GPU"
    elif world_size > 1:
        reason = f"it is for one rank, and there are {world_size}, which reduce gradients within their updates"
    if reason is not None:
        log.info("engine.cuda_graphs has no effect: %s", reason)
        return None
    return CudaGraphs(device)


class Repeated(Generic[T]):
    """Work that is done in each step: recorded once the host's numbers have stayed the same, replayed while they do."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._numbers: Any = None
        self._times = 0
        self._recording: Recording[T] | None = None

    def __call__(self, work: Callable[[], T], numbers: object) -> T:
        """Do the work, or replay it.

        Args:
            work: reads and writes the same tensors in each step, and returns its result in new ones.
            numbers: all that it depends on besides tensors, compared by `==`; None: work that is not to be recorded.

        Returns:
            The result. The next call may write into its tensors.
        """
        if numbers is None:
            return self._recorder.run(work)
        if numbers != self._numbers:
            self._numbers, self._times, self._recording = numbers, 0, None
        if self._recording is not None:
            self._recording.replay()
            return self._recording.result
        if self._times < WARM_UP:
            self._times += 1
            return self._recorder.run(work)
        self._recording = self._recorder.record(work)
        return self._recording.result
