"""Which samples make up a batch: pure integer functions of (seed, shard sizes, position), without state.

The training stream is endless. Position p belongs to epoch p // N of N samples, and batch k covers the positions
[k * B, (k + 1) * B). Every sample comes once per epoch, and the tail of an epoch shares a batch with the head of the
next one. Within an epoch, the shards are permuted and cut into windows of a few shards, and the samples of a window are
permuted. So reading at any position opens only the shards of one window. The order does not depend on world size, ranks
or loader processes: they read parts of it.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
_KEY_TAG = 0x64617461  # "data": keeps these draws apart from any other use of the same seed
_SHARDS, _SAMPLES = 0, 1


def permutation(length: int, *, seed: int, purpose: int, epoch: int, window: int) -> IntArray:
    """A permutation of range(length), drawn from Philox4x64 (Salmon et al. 2011) at its own counter.

    It sorts raw 64-bit outputs, which numpy keeps stable. `Generator.permutation` may change between releases, and
    would change the order of a run that resumes after an upgrade.
    """
    generator = np.random.Philox(
        key=np.array([seed, _KEY_TAG], dtype=np.uint64),
        counter=np.array([0, window, epoch, purpose], dtype=np.uint64),
    )
    return np.argsort(np.asarray(generator.random_raw(length)), kind="stable").astype(np.int64)


class Span(NamedTuple):
    """Stream positions [start, stop) of one micro-batch, `number` micro-batches after the first one of this rank."""

    number: int
    start: int
    stop: int


class SampleOrder:
    """The order of all epochs. Caches the last windows; equal arguments give equal results."""

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, window_shards: int) -> None:
        """Check and store.

        Args:
            shard_sizes: samples of each shard, in index order; each at least 1.
            seed: 0 .. 2**64 - 1.
            window_shards: shards whose samples are mixed, at least 1.
        """
        if not shard_sizes or min(shard_sizes) < 1:
            raise ValueError(f"shard sizes are {list(shard_sizes)[:8]}: at least one shard of at least one sample")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: allowed are 0 to 2**64 - 1")
        if window_shards < 1:
            raise ValueError(f"window_shards is {window_shards}: allowed is 1 or more")
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._seed = seed
        self._window_shards = window_shards
        self.num_samples = int(self._sizes.sum())
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)
        self._window = lru_cache(maxsize=2)(self._draw_window)

    def locate(self, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """The samples at stream positions [start, stop): arrays of shard numbers and of sample numbers in them."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions [{start}, {stop}) are no range of the stream")
        shards: list[IntArray] = [np.empty(0, dtype=np.int64)]
        samples: list[IntArray] = [np.empty(0, dtype=np.int64)]
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            _, window_starts = self._epoch(epoch)
            window = int(np.searchsorted(window_starts, offset, side="right")) - 1
            first, end = int(window_starts[window]), int(window_starts[window + 1])
            window_shards, window_samples = self._window(epoch, window)
            count = min(stop - start, end - offset)
            part = slice(offset - first, offset - first + count)
            shards.append(window_shards[part])
            samples.append(window_samples[part])
            start += count
        return np.concatenate(shards), np.concatenate(samples)

    def windows(self, position: int) -> tuple[list[int], list[int]]:
        """Shards of the window at a stream position, to keep, and of the next window, to fetch."""
        epoch, offset = divmod(position, self.num_samples)
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, offset, side="right")) - 1
        last = window + 2 == len(starts)
        following = (epoch + 1, 0) if last else (epoch, window + 1)
        return self._shards_of(epoch, window).tolist(), self._shards_of(*following).tolist()

    def _shards_of(self, epoch: int, window: int) -> IntArray:
        order, _ = self._epoch(epoch)
        return order[window * self._window_shards : (window + 1) * self._window_shards]

    def _draw_epoch(self, epoch: int) -> tuple[IntArray, IntArray]:
        """Shards in the order of this epoch; offsets in the epoch where windows start, plus its end."""
        order = permutation(len(self._sizes), seed=self._seed, purpose=_SHARDS, epoch=epoch, window=0)
        ends = np.cumsum(self._sizes[order])
        bounds = [*range(self._window_shards, len(order), self._window_shards), len(order)]
        return order, np.concatenate([np.zeros(1, dtype=np.int64), ends[np.asarray(bounds) - 1]])

    def _draw_window(self, epoch: int, window: int) -> tuple[IntArray, IntArray]:
        shards = self._shards_of(epoch, window)
        sizes = self._sizes[shards]
        shard_of_sample = np.repeat(shards, sizes)
        number_in_shard = np.arange(len(shard_of_sample)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        mixed = permutation(len(shard_of_sample), seed=self._seed, purpose=_SAMPLES, epoch=epoch, window=window)
        return shard_of_sample[mixed], number_in_shard[mixed]


def micro_batch_spans(
    *,
    global_batch_size: int,
    share: tuple[int, int],
    micro_batch_size: int,
    first_batch: int,
    process: int = 0,
    num_processes: int = 1,
) -> Iterator[Span]:
    """The endless micro-batches of one loader process of a rank.

    A rank's micro-batches are numbered across its batches. Process w of W makes the numbers w, w + W, ..., so that
    taking from the processes in turn gives all numbers in order for any W.

    Args:
        global_batch_size: samples of a batch over all ranks.
        share: [start, stop) within each global batch that this rank reads.
        micro_batch_size: samples of a micro-batch; the last one of a batch is smaller if it does not divide the share.
        first_batch: batch to start with.
        process: number of this loader process.
        num_processes: number of loader processes of the rank.
    """
    start, stop = share
    if not 0 <= start < stop <= global_batch_size:
        raise ValueError(f"share is [{start}, {stop}): it must be a non-empty part of [0, {global_batch_size})")
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size is {micro_batch_size}: allowed is 1 or more")
    if first_batch < 0:
        raise ValueError(f"first_batch is {first_batch}: allowed is 0 or more")
    return _spans(global_batch_size, share, micro_batch_size, first_batch, process, num_processes)


def _spans(
    global_batch_size: int,
    share: tuple[int, int],
    micro_batch_size: int,
    first_batch: int,
    process: int,
    num_processes: int,
) -> Iterator[Span]:
    start, stop = share
    per_batch = -(-(stop - start) // micro_batch_size)
    number = process
    while True:
        batch, part = divmod(number, per_batch)
        offset = (first_batch + batch) * global_batch_size
        first = start + part * micro_batch_size
        yield Span(number, offset + first, offset + min(first + micro_batch_size, stop))
        number += num_processes
