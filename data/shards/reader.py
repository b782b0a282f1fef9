"""Random access to the samples of local tar shards, so that a rank reads only the images of its share."""

import contextlib
import hashlib
import os
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.shards.index import Shard
from data.shards.offsets import BLOCK, IMAGE_EXTENSIONS, NO_NUMBER, OpenFile, Table, find_samples, parse_header, pread
from data.storage.location import DataError

_MAX_TABLE_SAMPLES = 4_000_000
"""Samples whose positions a process keeps: 48 MB."""


class BadSampleError(DataError):
    """One sample cannot be used; the rest of its shard may be good."""


class EncodedSample(NamedTuple):
    """A sample as stored in the shard."""

    shard: str
    key: str
    extension: str
    content: bytes
    label: int | None


class ShardReader:
    """Reads single samples of one shard, each with one system call."""

    def __init__(self, open_file: OpenFile, shard: Shard, table: Table | None = None) -> None:
        """Open a shard.

        Args:
            open_file: opens the shard, and its offsets if `table` is not given.
            shard: its entry in the index.
            table: result of `find_samples`; None finds them now.

        Raises:
            DataError: a file is missing, or does not match the index.
        """
        self._shard = shard
        self._descriptor = open_file(shard)
        try:
            self.table = find_samples(self._descriptor, shard, open_file) if table is None else table
        except BaseException:
            self.close()
            raise

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 [N]: the label of each sample, -1 if missing or damaged."""
        labels = self.table[:, 2].astype(np.int64) - 1
        return np.where(labels == NO_NUMBER, -1, labels)

    def read(self, sample: int) -> EncodedSample:
        """The encoded image and label of a sample, counted from 0 in archive order.

        Raises:
            BadSampleError: its label is not a number.
            DataError: the file cannot be read, has changed, or does not match its offsets.
        """
        block, size, label = self.table[sample].tolist()
        content = pread(self._descriptor, self._shard, BLOCK + size, block * BLOCK)
        member = parse_header(content[:BLOCK])
        if (
            member is None
            or member.extension not in IMAGE_EXTENSIONS
            or member.size != size
            or len(content) != BLOCK + size
        ):
            raise self._mismatch(block)
        if label == NO_NUMBER + 1:
            digits = pread(self._descriptor, self._shard, BLOCK, (block - 1) * BLOCK).rstrip(b"\0")
            raise BadSampleError(
                f"shard {self._shard.name}, key {member.key}: label {digits!r} is no number; prepare the data set again"
            )
        return EncodedSample(
            self._shard.name, member.key, member.extension, content[BLOCK:], None if label == 0 else label - 1
        )

    def keys(self) -> Iterator[str]:
        """The key of each sample, in archive order; the images are not read.

        Raises:
            DataError: the file cannot be read, or does not match its offsets.
        """
        for block in self.table[:, 0].tolist():
            member = parse_header(pread(self._descriptor, self._shard, BLOCK, block * BLOCK))
            if member is None:
                raise self._mismatch(block)
            yield member.key

    def _mismatch(self, block: int) -> DataError:
        offsets = self._shard.offsets
        problem = "the file changed while it was read" if offsets is None else f"it does not match {offsets.name}"
        return DataError(
            f"shard {self._shard.name} at byte {block * BLOCK}: {problem}; copy it again or prepare the data again"
        )

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def key_hash(key: str) -> int:
    """A hash of 64 bits for the key of a sample: the keys themselves would take hundreds of megabytes."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def samples_in_order(shards: Sequence[Shard], open_file: OpenFile) -> Iterator[EncodedSample]:
    """All samples in archive order, one shard after another."""
    for shard in shards:
        with contextlib.closing(ShardReader(open_file, shard)) as reader:
            yield from map(reader.read, range(shard.num_samples))


class OpenShards:
    """The readers of one process for the shards of its current windows; others are closed."""

    def __init__(self, open_file: OpenFile, shards: Sequence[Shard], capacity: int) -> None:
        """Open nothing yet.

        Args:
            open_file: returns a descriptor of a local file of the data set.
            shards: the list that shard numbers refer to.
            capacity: files open at once; above it the least recently used one is closed.
        """
        self._open_file = open_file
        self._shards = shards
        self._capacity = capacity
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._tables: OrderedDict[int, Table] = OrderedDict()

    def read(self, shard: int, sample: int) -> EncodedSample:
        """Read a sample of a shard, both by number."""
        reader = self._readers.pop(shard, None)
        if reader is None:
            while len(self._readers) >= self._capacity:
                self._readers.popitem(last=False)[1].close()
            reader = ShardReader(self._open_file, self._shards[shard], self._tables.get(shard))
            self._remember(shard, reader.table)
        self._readers[shard] = reader
        return reader.read(sample)

    def keep(self, shards: Collection[int]) -> None:
        """Close the readers of all other shards."""
        for shard in set(self._readers).difference(shards):
            self._readers.pop(shard).close()

    def close(self) -> None:
        """Close all readers."""
        self.keep(())

    def _remember(self, shard: int, table: Table) -> None:
        self._tables[shard] = table
        while sum(map(len, self._tables.values())) > _MAX_TABLE_SAMPLES and len(self._tables) > 1:
            self._tables.popitem(last=False)
