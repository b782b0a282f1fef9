"""Where the samples of a shard are: read from its offsets file, or found by scanning the headers of the tar.

A tar has no table of contents. `python -m data.prepare` therefore writes one next to each shard: NNNNN.offsets holds
12 bytes for each sample, three little-endian unsigned 32-bit numbers as in `Table`, and nothing else. Data sets of
version 1 have no such files: each process that reads a shard scans it once, some 20 ms for 4,096 samples.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.shards.index import DataFile, Shard
from data.storage.location import DataError

PLANES_EXTENSION = "planes.png"
"""An image and what is given with it, one channel below the other in a grey PNG."""
IMAGE_EXTENSIONS = ("jpg", "png", PLANES_EXTENSION)
LABEL_EXTENSION = "cls"
BLOCK = 512
NO_NUMBER = 2**32 - 2
"""Marks a damaged label: only that sample is bad, the rest of its shard stays readable."""
_END = bytes(BLOCK)


OpenFile = Callable[[DataFile], int]
"""Returns a descriptor of a file of the data set, which the caller closes."""


Table = npt.NDArray[np.uint32]
"""[N, 3]: header block, image size in bytes, label + 1 (0: none) of each sample. Compact, since it is kept."""


class Member(NamedTuple):
    """A tar member, from its header."""

    key: str
    extension: str
    size: int


def find_samples(descriptor: int, shard: Shard, open_file: OpenFile) -> Table:
    """The table of a shard: from its offsets file, or by a scan where the data set is of version 1.

    Args:
        descriptor: the open shard, which is not read if it has offsets.
        shard: its entry in the index.
        open_file: opens the offsets file.

    Raises:
        DataError: a file is missing, or does not match the index.
    """
    return scan(descriptor, shard) if shard.offsets is None else read_offsets(shard, open_file)


def read_offsets(shard: Shard, open_file: OpenFile) -> Table:
    """The table in a shard's offsets file, whose hash is checked at each call.

    Raises:
        DataError: the file is missing, or does not match the index.
    """
    offsets = shard.offsets
    assert offsets is not None
    descriptor = open_file(offsets)
    try:
        content = pread(descriptor, offsets, offsets.num_bytes + 1, 0)
    finally:
        os.close(descriptor)
    found = hashlib.sha256(content).hexdigest()
    if found != offsets.sha256:
        raise DataError(
            f"{offsets.title}: the file is damaged: its SHA-256 is {found}, the index says {offsets.sha256}; copy it "
            "again, from a URL by removing data.cache_directory, or prepare the data again"
        )
    return np.frombuffer(content, dtype="<u4").reshape(-1, 3)


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
            label, label_key = int(digits[0]) if digits else NO_NUMBER, member.key
        elif member.extension in IMAGE_EXTENSIONS:
            rows.append((offset // BLOCK, member.size, 1 + label if label_key == member.key else 0))
        else:
            raise DataError(f"shard {shard.name}, key {member.key}: unknown member .{member.extension}")
    if len(rows) != shard.num_samples:
        raise DataError(
            f"shard {shard.name} has {len(rows)} samples, the index says {shard.num_samples}; "
            "copy it again or prepare the data again"
        )
    return np.asarray(rows, dtype="<u4")


def parse_header(block: bytes) -> Member | None:
    """Name and size from a ustar header as data.prepare writes it; None for anything else. Ignores the checksum."""
    key, dot, extension = block[:100].rstrip(b"\0").partition(b".")
    try:
        # 12 octal digits, magic, a regular file, and no part of the name in the prefix field.
        size = int(block[124:136].rstrip(b" \0"), 8)
        if not dot or block[156:157] not in b"0\0" or block[257:262] != b"ustar" or block[345:346] != b"\0" or size < 0:
            return None
        return Member(key.decode("ascii"), extension.decode("ascii"), size)
    except ValueError:
        return None


def pread(descriptor: int, file: DataFile, count: int, offset: int) -> bytes:
    """Up to `count` bytes of an open file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return os.pread(descriptor, count, offset)
    except OSError as error:
        raise DataError(f"{file.title} at byte {offset}: {error.strerror}") from None


def _members(descriptor: int, shard: Shard) -> Iterator[tuple[int, Member, bytes]]:
    """Offset, header and first block of each member. All header checksums are checked together at the end."""
    headers: list[bytes] = []
    offsets: list[int] = []
    offset = 0
    while True:
        # A label and its header fit in two blocks, so one call reads both.
        blocks = pread(descriptor, shard, 2 * BLOCK, offset)
        header = blocks[:BLOCK]
        if header == _END:
            break
        member = parse_header(header)
        if member is None:
            raise _damaged(shard, offset)
        headers.append(header)
        offsets.append(offset)
        yield offset, member, blocks[BLOCK:]
        offset += BLOCK + -(-member.size // BLOCK) * BLOCK
    fields = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, BLOCK)
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
