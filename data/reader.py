"""Random access to the samples of a local tar shard, so that a rank reads only the images of its own share."""

import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.shards import DataError, Shard

IMAGE_EXTENSIONS = ("jpg", "png")
LABEL_EXTENSION = "cls"
_BLOCK = 512


class EncodedSample(NamedTuple):
    """A sample as the shard holds it."""

    shard: str
    key: str
    extension: str
    content: bytes
    label: int | None


class _Member(NamedTuple):
    key: str
    extension: str
    size: int


def _parse_header(block: bytes, where: str) -> _Member | None:
    """A ustar header as TarWriter writes it; None for the zero block that ends the archive."""
    if len(block) == _BLOCK and not any(block):
        return None
    try:
        stated = int(block[148:156].strip(b" \0"), 8)
        size = int(block[124:136].strip(b" \0"), 8)
        name = block[:100].split(b"\0", 1)[0].decode("ascii")
    except ValueError:
        stated, size, name = -1, 0, ""
    # The checksum counts its own eight bytes as spaces.
    intact = len(block) == _BLOCK and sum(block) - sum(block[148:156]) + 8 * 0x20 == stated
    key, dot, extension = name.partition(".")
    if not intact or block[257:262] != b"ustar" or block[156:157] not in b"0\0" or block[345:346] != b"\0" or not dot:
        raise DataError(f"{where}: damaged, or no tar member as `python -m data.prepare` writes them")
    return _Member(key, extension, size)


class ShardReader:
    """Reads single samples of one local shard. Opening scans the headers once; a read is one system call."""

    def __init__(self, directory: Path, shard: Shard) -> None:
        self._shard = shard
        self._file = directory / shard.name
        try:
            self._descriptor = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(
                f"shard {shard.name}: cannot open {self._file}: {error.strerror}; "
                "copy it again or prepare the data again"
            ) from None
        try:
            # Compact on purpose: header offset, image size, label (-1: none) of each sample.
            self._table = self._scan()
        except BaseException:
            self.close()
            raise

    def read(self, sample: int) -> EncodedSample:
        """The encoded image and label of a sample, counted from 0 in the order of the archive."""
        offset, size, label = (int(value) for value in self._table[sample])
        content = self._pread(_BLOCK + size, offset)
        member = _parse_header(content[:_BLOCK], self._where(offset))
        if member is None or member.size != size or len(content) != _BLOCK + size:
            raise DataError(f"{self._where(offset)}: the file changed while it was read; copy it again")
        return EncodedSample(
            self._shard.name, member.key, member.extension, content[_BLOCK:], None if label < 0 else label
        )

    def close(self) -> None:
        """Close the file; reading is over."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _where(self, offset: int) -> str:
        return f"shard {self._shard.name}: {self._file} at byte {offset}"

    def _pread(self, count: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, count, offset)
        except OSError as error:
            raise DataError(f"{self._where(offset)}: {error.strerror}") from None

    def _scan(self) -> npt.NDArray[np.int64]:
        rows: list[tuple[int, int, int]] = []
        offset, label, label_key = 0, -1, ""
        while True:
            # A label and its header fit in two blocks, so this one call reads both.
            blocks = self._pread(2 * _BLOCK, offset)
            member = _parse_header(blocks[:_BLOCK], self._where(offset))
            if member is None:
                break
            if member.extension == LABEL_EXTENSION:
                digits = blocks[_BLOCK : _BLOCK + member.size]
                if not re.fullmatch(rb"\d{1,9}", digits):
                    raise DataError(f"shard {self._shard.name}, key {member.key}: label {digits!r} is no number")
                label, label_key = int(digits), member.key
            elif member.extension in IMAGE_EXTENSIONS:
                rows.append((offset, member.size, label if label_key == member.key else -1))
            else:
                raise DataError(f"shard {self._shard.name}, key {member.key}: unknown member .{member.extension}")
            offset += _BLOCK + -(-member.size // _BLOCK) * _BLOCK
        if len(rows) != self._shard.num_samples:
            raise DataError(
                f"shard {self._shard.name}: {self._file} has {len(rows)} samples, the index says "
                f"{self._shard.num_samples}; copy it again or prepare the data again"
            )
        return np.asarray(rows, dtype=np.int64)


class ReaderCache:
    """The readers of one process, the least recently used one closed when there are too many."""

    def __init__(self, directory: Path, shards: tuple[Shard, ...], capacity: int) -> None:
        self._directory = directory
        self._shards = shards
        self._capacity = capacity
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    def read(self, shard: int, sample: int) -> EncodedSample:
        """A sample of a shard, both by number."""
        reader = self._readers.pop(shard, None) or ShardReader(self._directory, self._shards[shard])
        self._readers[shard] = reader
        if len(self._readers) > self._capacity:
            self._readers.popitem(last=False)[1].close()
        return reader.read(sample)

    def close(self) -> None:
        """Close all files."""
        while self._readers:
            self._readers.popitem()[1].close()
