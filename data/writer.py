"""Tar shards and their index, written so that equal input gives equal bytes and nothing unfinished is ever seen."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, cast

from webdataset.writer import TarWriter

from data.shards import INDEX_NAME, IndexDocument, Shard


class HashingFile:
    """A new file that is hashed and counted while it is written."""

    def __init__(self, path: Path) -> None:
        self._stream: IO[bytes] = path.open("xb")
        self._digest = hashlib.sha256()
        self._discarded = False
        self.num_bytes = 0

    def write(self, content: bytes) -> int:
        """Append bytes."""
        if self._discarded:
            return len(content)
        self._digest.update(content)
        self.num_bytes += len(content)
        return self._stream.write(content)

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self._stream.closed:
            with self._stream:
                self._stream.flush()
                os.fsync(self._stream.fileno())

    def discard(self) -> None:
        """Close and take further writes without effect: a tar writer flushes once more when it is dropped."""
        self._discarded = True
        # The disk may be full, and the file is about to be removed.
        with contextlib.suppress(OSError):
            self._stream.close()

    @property
    def sha256(self) -> str:
        """Hash of what was written."""
        return self._digest.hexdigest()


class ShardSequence:
    """Writes samples to 00000.tar, 00001.tar, ... A `with` statement closes the last one."""

    def __init__(self, directory: Path, *, shard_samples: int | None, shard_bytes: int | None) -> None:
        """Begin.

        Args:
            directory: where the shards go.
            shard_samples: samples in a shard, None for no limit.
            shard_bytes: a shard ends with the sample that takes its file past this size, None for no limit.
        """
        self._directory = directory
        self._shard_samples = shard_samples
        self._shard_bytes = shard_bytes
        self._num_samples = 0
        self._open: tuple[HashingFile, TarWriter] | None = None
        self.shards: list[Shard] = []

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Append a sample.

        Args:
            key: ASCII without a dot, at most 90 characters.
            members: content by extension.
        """
        file, tar = self._open = self._open or self._begin()
        tar.write({"__key__": key, **members})
        self._num_samples += 1
        full = self._shard_samples is not None and self._num_samples >= self._shard_samples
        if full or (self._shard_bytes is not None and file.num_bytes >= self._shard_bytes):
            self._finish()

    def __enter__(self) -> "ShardSequence":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        elif self._open is not None:
            self._open[0].discard()

    def _next_name(self) -> str:
        return f"{len(self.shards):05d}.tar"

    def _begin(self) -> tuple[HashingFile, TarWriter]:
        file = HashingFile(self._directory / self._next_name())
        # Fixed owner, mode and time: the same samples give the same file.
        return file, TarWriter(cast(BinaryIO, file), user="root", group="root", mode=0o444, mtime=0, encoder=False)

    def _finish(self) -> None:
        if self._open is None:
            return
        file, tar = self._open
        tar.close()
        file.close()
        shard = Shard(
            name=self._next_name(), num_samples=self._num_samples, num_bytes=file.num_bytes, sha256=file.sha256
        )
        self.shards.append(shard)
        self._open, self._num_samples = None, 0


def write_index(directory: Path, document: IndexDocument) -> None:
    """Write index.json: on the disk as a whole or not at all."""
    content: dict[str, Any] = asdict(document)
    unfinished = directory / f"{INDEX_NAME}.unfinished"
    with unfinished.open("x", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.rename(directory / INDEX_NAME)
    _sync_folder(directory)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write in. It takes the name of `target` at the end, or goes away on any error.

    Args:
        target: does not exist, or is an empty folder. Missing parents are made, and removed again on an error.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    unfinished = target.parent / f".{target.name}.unfinished-{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        yield unfinished
        # Fails, and loses nothing, if something came to lie there in the meantime.
        unfinished.rename(target)
        _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
