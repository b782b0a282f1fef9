"""Writes tar shards, their offsets and the index: equal input gives equal bytes, and finished files are flushed."""

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO

from data.shards.index import INDEX_NAME, IndexDocument, Offsets, Shard, index_content, offsets_name
from data.shards.offsets import scan
from data.storage.files import sync_folder, write_json


class HashingFile:
    """A new file, hashed and counted while it is written."""

    def __init__(self, path: Path) -> None:
        self._stream: IO[bytes] = path.open("xb")
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, content: bytes) -> None:
        """Append bytes."""
        self._digest.update(content)
        self.num_bytes += len(content)
        self._stream.write(content)

    def close(self) -> None:
        """Flush to the disk and close."""
        with self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def discard(self) -> None:
        """Close a file that is about to be removed; the disk may be full."""
        with contextlib.suppress(OSError):
            self._stream.close()

    @property
    def sha256(self) -> str:
        """Hash of the content."""
        return self._digest.hexdigest()


class ShardSequence:
    """Writes samples to 00000.tar, 00001.tar, ... and offsets. Use a `with` statement; `finish` ends the last one."""

    def __init__(
        self, directory: Path, *, shard_samples: int | None, shard_bytes: int | None, finished: Sequence[Shard] = ()
    ) -> None:
        """Write no file yet.

        Args:
            directory: folder of the shards.
            shard_samples: samples per shard, None for no limit.
            shard_bytes: a shard ends when its file reaches this size, None for no limit.
            finished: the first shards, which exist already.
        """
        self._directory = directory
        self._shard_samples = shard_samples
        self._shard_bytes = shard_bytes
        self._num_samples = 0
        self._file: HashingFile | None = None
        self.shards: list[Shard] = list(finished)

    def write(self, key: str, members: dict[str, bytes]) -> Shard | None:
        """Append a sample.

        Args:
            key: ASCII without a dot or slash, at most 90 characters.
            members: content by extension.

        Returns:
            The shard that this sample finished, flushed to the disk.
        """
        if self._file is None:
            self._file = HashingFile(self._directory / self._next_name())
        for extension in sorted(members):
            self._write_member(self._file, f"{key}.{extension}", members[extension])
        self._num_samples += 1
        full = self._shard_samples is not None and self._num_samples >= self._shard_samples
        if full or (self._shard_bytes is not None and self._file.num_bytes >= self._shard_bytes):
            return self.finish()
        return None

    def finish(self) -> Shard | None:
        """End the current shard; None if there is none."""
        if self._file is None:
            return None
        # Two empty blocks end an archive, and its size is a multiple of 20 blocks.
        end = self._file.num_bytes + 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        self._file.close()
        shard = Shard(
            name=self._next_name(),
            num_samples=self._num_samples,
            num_bytes=self._file.num_bytes,
            sha256=self._file.sha256,
        )
        shard = replace(shard, offsets=write_offsets(self._directory, shard))
        sync_folder(self._directory)
        self.shards.append(shard)
        self._file, self._num_samples = None, 0
        return shard

    def __enter__(self) -> "ShardSequence":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._file is not None:
            self._file.discard()

    def _next_name(self) -> str:
        return f"{len(self.shards):05d}.tar"

    @staticmethod
    def _write_member(file: HashingFile, name: str, content: bytes) -> None:
        header = tarfile.TarInfo(name)
        # Fixed owner, mode and time, so that the same samples give the same file.
        header.uname = header.gname = "root"
        header.mode, header.mtime, header.size = 0o444, 0, len(content)
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.write(content)
        file.write(bytes(-len(content) % tarfile.BLOCKSIZE))


def sample_bytes(members: dict[str, bytes]) -> int:
    """Bytes that a sample takes of its shard."""
    return sum(
        tarfile.BLOCKSIZE - (-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE for content in members.values()
    )


def write_offsets(directory: Path, shard: Shard) -> Offsets:
    """Write the offsets of a finished shard, as a scan finds them, so that readers need none.

    Raises:
        DataError: the shard does not match its entry.
    """
    descriptor = os.open(directory / shard.name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        table = scan(descriptor, shard)
    finally:
        os.close(descriptor)
    file = HashingFile(directory / offsets_name(shard.name))
    try:
        file.write(table.tobytes())
        file.close()
    except BaseException:
        file.discard()
        raise
    return Offsets(name=offsets_name(shard.name), num_bytes=file.num_bytes, sha256=file.sha256)


def write_index(directory: Path, document: IndexDocument) -> None:
    """Write index.json, atomically and durably."""
    write_json(directory / INDEX_NAME, index_content(document))
