"""Random access to the samples of local tar shards, so that a rank reads only the images of its share.

A tar has no table of contents. So each process scans the headers of a shard once: about 20 ms for 4,096 samples. A
thread scans the next shards while the current ones are read, and the tables are kept.
"""

import contextlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.shards.index import Shard
from data.storage.location import DataError

IMAGE_EXTENSIONS = ("jpg", "png")
LABEL_EXTENSION = "cls"
_BLOCK = 512
_END = bytes(_BLOCK)
_NO_NUMBER = 2**32 - 2
"""Marks a damaged label: only that sample is bad, the rest of its shard stays readable."""
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


class _Member(NamedTuple):
    key: str
    extension: str
    size: int


def _parse_header(block: bytes) -> _Member | None:
    """Name and size from a ustar header as data.prepare writes it; None for anything else. Ignores the checksum."""
    key, dot, extension = block[:100].rstrip(b"\0").partition(b".")
    try:
        # 12 octal digits, magic, a regular file, and no part of the name in the prefix field.
        size = int(block[124:136].rstrip(b" \0"), 8)
        if not dot or block[156:157] not in b"0\0" or block[257:262] != b"ustar" or block[345:346] != b"\0" or size < 0:
            return None
        return _Member(key.decode("ascii"), extension.decode("ascii"), size)
    except ValueError:
        return None


Table = npt.NDArray[np.uint32]
"""[N, 3]: header block, image size in bytes, label + 1 (0: none) of each sample. Compact, since it is kept."""


def scan(descriptor: int, shard: Shard) -> Table:
    """Read all headers of an open shard.

    Raises:
        DataError: the file does not match the index.
    """
    rows: list[tuple[int, int, int]] = []
    label, label_key = -1, ""
    for offset, member, content in _members(descriptor, shard):
        if member.extension == LABEL_EXTENSION:
            digits = re.fullmatch(rb"\d{1,9}", content[: member.size])
            label, label_key = int(digits[0]) if digits else _NO_NUMBER, member.key
        elif member.extension in IMAGE_EXTENSIONS:
            rows.append((offset // _BLOCK, member.size, 1 + label if label_key == member.key else 0))
        else:
            raise DataError(f"shard {shard.name}, key {member.key}: unknown member .{member.extension}")
    if len(rows) != shard.num_samples:
        raise DataError(
            f"shard {shard.name} has {len(rows)} samples, the index says {shard.num_samples}; "
            "copy it again or prepare the data again"
        )
    return np.asarray(rows, dtype=np.uint32)


def _members(descriptor: int, shard: Shard) -> Iterator[tuple[int, _Member, bytes]]:
    """Offset, header and first block of each member. All header checksums are checked together at the end."""
    headers: list[bytes] = []
    offsets: list[int] = []
    offset = 0
    while True:
        # A label and its header fit in two blocks, so one call reads both.
        blocks = _pread(descriptor, shard, 2 * _BLOCK, offset)
        header = blocks[:_BLOCK]
        if header == _END:
            break
        member = _parse_header(header)
        if member is None:
            raise _damaged(shard, offset)
        headers.append(header)
        offsets.append(offset)
        yield offset, member, blocks[_BLOCK:]
        offset += _BLOCK + -(-member.size // _BLOCK) * _BLOCK
    fields = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, _BLOCK)
    # Six octal digits; the sum counts its own eight bytes as spaces.
    stated = (fields[:, 148:154].astype(np.int64) - ord("0")) @ (8 ** np.arange(5, -1, -1))
    found = fields.sum(axis=1, dtype=np.int64) - fields[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * 0x20
    if (wrong := np.flatnonzero(stated != found)).size:
        raise _damaged(shard, offsets[wrong[0]])


def _damaged(shard: Shard, offset: int) -> DataError:
    return DataError(
        f"shard {shard.name} at byte {offset}: damaged, or no tar member as `python -m data.prepare` writes them; "
        "copy it again or prepare the data again"
    )


def _pread(descriptor: int, shard: Shard, count: int, offset: int) -> bytes:
    try:
        return os.pread(descriptor, count, offset)
    except OSError as error:
        raise DataError(f"shard {shard.name} at byte {offset}: {error.strerror}") from None


class ShardReader:
    """Reads single samples of one open shard, each with one system call."""

    def __init__(self, descriptor: int, shard: Shard, table: Table | None = None) -> None:
        """Take over an open file.

        Args:
            descriptor: the whole shard, open for reading; closed by `close`, and on an error here.
            shard: its entry in the index.
            table: result of `scan`; None scans now.

        Raises:
            DataError: the file does not match the index.
        """
        self._shard = shard
        self._descriptor = descriptor
        try:
            self.table = scan(descriptor, shard) if table is None else table
        except BaseException:
            self.close()
            raise

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 [N]: the label of each sample, -1 if missing or damaged."""
        labels = self.table[:, 2].astype(np.int64) - 1
        return np.where(labels == _NO_NUMBER, -1, labels)

    def read(self, sample: int) -> EncodedSample:
        """The encoded image and label of a sample, counted from 0 in archive order.

        Raises:
            BadSampleError: its label is not a number.
            DataError: the file cannot be read, or has changed.
        """
        block, size, label = self.table[sample].tolist()
        content = _pread(self._descriptor, self._shard, _BLOCK + size, block * _BLOCK)
        member = _parse_header(content[:_BLOCK])
        if member is None or member.size != size or len(content) != _BLOCK + size:
            raise DataError(
                f"shard {self._shard.name} at byte {block * _BLOCK}: the file changed while it was read; copy it again"
            )
        if label == _NO_NUMBER + 1:
            digits = _pread(self._descriptor, self._shard, _BLOCK, (block - 1) * _BLOCK).rstrip(b"\0")
            raise BadSampleError(
                f"shard {self._shard.name}, key {member.key}: label {digits!r} is no number; prepare the data set again"
            )
        return EncodedSample(
            self._shard.name, member.key, member.extension, content[_BLOCK:], None if label == 0 else label - 1
        )

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def samples_in_order(shards: Sequence[Shard], open_shard: Callable[[Shard], int]) -> Iterator[EncodedSample]:
    """All samples in archive order, one shard after another."""
    for shard in shards:
        with contextlib.closing(ShardReader(open_shard(shard), shard)) as reader:
            yield from map(reader.read, range(shard.num_samples))


class OpenShards:
    """The readers of one process for the shards of its current windows; others are closed."""

    def __init__(self, open_shard: Callable[[Shard], int], shards: Sequence[Shard], capacity: int) -> None:
        """Open nothing yet.

        Args:
            open_shard: returns a descriptor of a shard's local file.
            shards: the list that shard numbers refer to.
            capacity: files open at once; above it the least recently used one is closed.
        """
        self._open_shard = open_shard
        self._shards = shards
        self._capacity = capacity
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._tables: OrderedDict[int, Table] = OrderedDict()
        self._lock = threading.Lock()
        self._ahead: tuple[int, ...] = ()
        self._scanner: threading.Thread | None = None

    def read(self, shard: int, sample: int) -> EncodedSample:
        """Read a sample of a shard, both by number."""
        reader = self._readers.pop(shard, None)
        if reader is None:
            while len(self._readers) >= self._capacity:
                self._readers.popitem(last=False)[1].close()
            descriptor = self._open_shard(self._shards[shard])
            reader = ShardReader(descriptor, self._shards[shard], self._tables.get(shard))
            self._remember(shard, reader.table)
        self._readers[shard] = reader
        return reader.read(sample)

    def keep(self, shards: Collection[int], ahead: Sequence[int] = ()) -> None:
        """Close the readers of all other shards, and scan the shards `ahead` in a thread."""
        for shard in set(self._readers).difference(shards):
            self._readers.pop(shard).close()
        # Scan no more than fits in the table memory: later tables would evict earlier ones, again and again.
        ends = accumulate(self._shards[shard].num_samples for shard in ahead)
        self._ahead = tuple(shard for shard, end in zip(ahead, ends, strict=True) if end <= _MAX_TABLE_SAMPLES)
        unknown = any(shard not in self._tables for shard in self._ahead)
        if unknown and not (self._scanner and self._scanner.is_alive()):
            self._scanner = threading.Thread(target=self._scan_ahead, name="scan-ahead", daemon=True)
            self._scanner.start()

    def close(self) -> None:
        """Close all readers."""
        self.keep(())

    def _remember(self, shard: int, table: Table) -> None:
        with self._lock:
            self._tables[shard] = table
            while sum(map(len, self._tables.values())) > _MAX_TABLE_SAMPLES and len(self._tables) > 1:
                self._tables.popitem(last=False)

    def _scan_ahead(self) -> None:
        # `read` meets the same error again and reports it.
        with contextlib.suppress(DataError):
            while unknown := [shard for shard in self._ahead if shard not in self._tables]:
                descriptor = self._open_shard(self._shards[unknown[0]])
                try:
                    self._remember(unknown[0], scan(descriptor, self._shards[unknown[0]]))
                finally:
                    os.close(descriptor)
