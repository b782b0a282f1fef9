"""Micro-batches of a rank from its loader processes, in order, with bad samples named and counted.

Pixels do not pass through the DataLoader's queue: new shared memory for each batch costs as much as half the decoding
of a 256 px JPEG (mostly page faults). Each loader process writes into a few permanent slots. The rank copies a slot
into its working memory, which is page-locked if a GPU reads it.
"""

import logging
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset
from webdataset.pipeline import DataPipeline

from data.processes.loader import LoaderContext, initialize_loader
from data.storage.errors import OperationError
from data.storage.location import DataError

log = logging.getLogger(__name__)

_LISTED = 5
_PREFETCHED = 2
"""Micro-batches requested from a loader process in advance."""
_QUEUE_BYTES = 256 * 1024
"""The queues between the processes keep their semaphores there too, a page each."""
_SHARED_MEMORY = "/dev/shm"


class LoaderError(OperationError):
    """A loader process ended; the message says which and how."""


class Replaced(NamedTuple):
    """A bad sample, and the one that replaces it."""

    shard: str
    """Shard of both."""
    key: str
    """Key of the replacement."""
    reason: str
    """Names the bad sample and its fault."""

    def __str__(self) -> str:
        return f"{self.reason}; key {self.key} is read in its place"


class Batch(NamedTuple):
    """A micro-batch."""

    images: torch.Tensor
    """uint8 [B, C, H, W]; memory layout [B, H, W, C] as written by decoders."""
    labels: torch.Tensor
    """int64 [B]; 0 if the data set has none."""
    keys: tuple[str, ...] = ()
    """Key of each sample within its data set, for messages and tests."""
    replaced: tuple[Replaced, ...] = ()
    """Bad samples of this batch with their replacements."""


@dataclass(frozen=True)
class Loaded:
    """A loader process's message for a micro-batch: its pixels or their place, or an error instead."""

    number: int
    """Counted over the micro-batches of the rank."""
    pixels: npt.NDArray[np.uint8] | int
    """uint8 [B, H, W, C]; or the number of samples, whose pixels are in this process's next slot."""
    labels: tuple[int, ...] = ()
    """As in Batch."""
    keys: tuple[str, ...] = ()
    """As in Batch."""
    replaced: tuple[Replaced, ...] = ()
    """As in Batch."""
    error: str = ""
    """Error message; it ends the stream here."""


class Slots:
    """Shared memory for the pixels of a rank's loader processes: a ring of slots for each."""

    def __init__(self, loader_workers: int, shape: tuple[int, int, int, int]) -> None:
        """Reserve it.

        Args:
            loader_workers: number of processes.
            shape: [B, H, W, C] of the largest micro-batch.

        Raises:
            DataError: the machine has too little shared memory.
        """
        # _PREFETCHED micro-batches are outstanding per process, and the rank copies one more slot.
        whole = (loader_workers, _PREFETCHED + 1, *shape)
        num_bytes = int(np.prod(whole))
        self._refuse_too_much(num_bytes)
        try:
            self._memory = torch.empty(whole, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            # Other ranks of the host may have taken the free memory meanwhile.
            raise DataError(self._too_little(num_bytes)) from error

    def of(self, process: int, turn: int) -> npt.NDArray[np.uint8]:
        """The slot for the `turn`-th micro-batch of a loader process."""
        return self._memory[process, turn % self._memory.shape[1]].numpy()

    @classmethod
    def _refuse_too_much(cls, num_bytes: int) -> None:
        # Shared memory may be allocated lazily: writing past the available part kills the process by a bus error.
        if os.path.isdir(_SHARED_MEMORY) and _free_bytes() < num_bytes + _QUEUE_BYTES:
            raise DataError(cls._too_little(num_bytes + _QUEUE_BYTES))

    @staticmethod
    def _too_little(num_bytes: int) -> str:
        left = f", {_SHARED_MEMORY} has {_shown(_free_bytes())} left" if os.path.isdir(_SHARED_MEMORY) else ""
        return (
            f"the loader processes need {_shown(num_bytes)} of shared memory{left}: set fewer data.loader_workers "
            "or a smaller training.micro_batch_size, or give the container more (docker run --shm-size)"
        )


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"


def _free_bytes() -> int:
    status = os.statvfs(_SHARED_MEMORY)
    return status.f_bavail * status.f_frsize


class BadSampleLimit:
    """Tracks the bad samples, and ends the run if their share of the data set is too large.

    It counts distinct samples, not encounters: those vary by chance between ranks and epochs, so that a run would
    depend on its number of ranks.
    """

    def __init__(self, *, max_percent: float, num_samples: int) -> None:
        """Start with no bad sample.

        Args:
            max_percent: percentage of the data set's samples that may be bad, 0 to 100.
            num_samples: of the data set.
        """
        self._max_percent = max_percent
        self._num_samples = num_samples
        self._met: dict[str, None] = {}

    def take(self, replaced: Iterable[str]) -> list[str]:
        """Count bad samples.

        Args:
            replaced: `Replaced` as text; samples may repeat.

        Returns:
            The samples seen for the first time.

        Raises:
            DataError: the limit is exceeded; names some of the samples.
        """
        new = [name for name in dict.fromkeys(replaced) if name not in self._met]
        self._met.update(dict.fromkeys(new))
        if len(self._met) > self._max_percent / 100 * self._num_samples:
            raise DataError(
                f"at least {len(self._met)} of {self._num_samples} samples are unusable, more than "
                f"data.max_bad_percent of {self._max_percent:g} allows: " + "; ".join(islice(self._met, _LISTED))
            )
        return new


class BatchIterator(Iterator[Batch]):
    """Endless micro-batches in order. Close it, or use it in a `with` statement, to end its loader processes."""

    def __init__(
        self,
        dataset: DataPipeline,
        *,
        loader_workers: int,
        slots: Slots | None,
        pin_memory: bool,
        bad_samples: BadSampleLimit,
    ) -> None:
        """Start the loader processes.

        Args:
            dataset: pipeline of `Loaded`; each process runs it for its own share.
            loader_workers: processes; 0 runs the pipeline in this process.
            slots: memory for the processes' pixels; None without processes.
            pin_memory: put batches in page-locked memory.
            bad_samples: counts the bad samples of this rank.
        """
        loader = DataLoader(
            cast("Dataset[Loaded]", dataset),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=loader_workers,
            prefetch_factor=_PREFETCHED if loader_workers else None,
            multiprocessing_context=LoaderContext() if loader_workers else None,
            worker_init_fn=initialize_loader if loader_workers else None,
            # Otherwise the DataLoader draws from torch's global generator.
            generator=torch.Generator().manual_seed(0),
        )
        self._expected = 0
        self._loader_workers = loader_workers
        self._slots = slots
        self._pin_memory = pin_memory
        self._bad_samples = bad_samples
        self._source: Iterator[Loaded] | None = iter(loader)

    def __next__(self) -> Batch:
        if self._source is None:
            raise StopIteration
        try:
            loaded = next(self._source)
        except BaseException as error:
            ended = self._ended_processes() if isinstance(error, RuntimeError) else ""
            self.close()
            if not ended:
                raise
            raise LoaderError(f"{ended}; with fewer data.loader_workers they take less memory") from error
        try:
            if loaded.error:
                raise DataError(loaded.error)
            assert loaded.number == self._expected, f"loader gave micro-batch {loaded.number}, not {self._expected}"
            batch = self._batch(loaded)
            for line in self._bad_samples.take(map(str, batch.replaced)):
                log.warning("%s", line)
        except BaseException:
            self.close()
            raise
        self._expected += 1
        return batch

    def _batch(self, loaded: Loaded) -> Batch:
        pixels = loaded.pixels
        if isinstance(pixels, int):
            assert self._slots is not None
            turn, process = divmod(loaded.number, self._loader_workers)
            pixels = self._slots.of(process, turn)[:pixels]
        if self._slots is None and not self._pin_memory:
            images = torch.from_numpy(pixels)
        else:
            # The slot is not overwritten before the next micro-batch is requested.
            images = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=self._pin_memory)
            images.numpy()[...] = pixels
        labels = torch.tensor(loaded.labels, dtype=torch.int64, pin_memory=self._pin_memory)
        return Batch(images.permute(0, 3, 1, 2), labels, loaded.keys, loaded.replaced)

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Ids of the loader processes."""
        return tuple(process.pid for process in getattr(self._source, "_workers", []))

    def _ended_processes(self) -> str:
        """The loader processes that ended, and how."""
        return ", ".join(
            f"loader process {process.pid} ended with {_exit_words(process.exitcode)}"
            for process in getattr(self._source, "_workers", [])
            if not process.is_alive()
        )

    def close(self) -> None:
        """End the loader processes; further calls do nothing."""
        source, self._source = self._source, None
        # Dropping the last reference would also work, but a traceback may keep one.
        shut_down = getattr(source, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _exit_words(code: int | None) -> str:
    if code is not None and code < 0:
        hint = " (most likely for want of memory)" if -code == signal.SIGKILL else ""
        return f"{signal.Signals(-code).name}{hint}"
    return f"exit code {code}"


def _unchanged(item: Any) -> Any:
    """Replaces the DataLoader's conversion, which is not needed here."""
    return item
