"""Atomic file writes, hashes and timestamps."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replaced(path: Path, *, durable: bool = False, draft: str | None = None) -> Iterator[Path]:
    """Yield a path next to `path` for a draft file or folder, and rename the draft to `path` at the end.

    A reader sees the old content or the complete new content. If anything fails, the old content stays and the draft
    is removed. The parent folder must exist.

    Args:
        path: file, replaced if it exists; or a folder, which must be empty or not exist.
        durable: flush a file's content and name to the disk before this ends, so that they survive a crash.
        draft: name of the draft; by default one that is unique to this process on this host.

    Raises:
        OSError: the draft cannot be renamed or flushed to the disk.
    """
    unfinished = path.with_name(draft or f".{path.name}.{os.getpid()}.tmp")
    _remove(unfinished)  # a process that still writes to it keeps its now unnamed file
    try:
        yield unfinished
        if durable:
            _sync(unfinished, os.O_RDONLY)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):  # a read-only folder allows no removal either
            _remove(unfinished)
        raise
    if durable:
        sync_folder(path.parent)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write or replace a JSON file, atomically and durably."""
    with replaced(file, durable=True, draft=f"{file.name}.unfinished") as draft:
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sha256_of(file: Path | int) -> str:
    """SHA-256 of a file, 64 hexadecimal digits. Takes a path, or a descriptor, which stays open.

    Raises:
        OSError: it cannot be read.
    """
    with open(os.dup(file) if isinstance(file, int) else file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def timestamp() -> str:
    """Current UTC time, to the second: 2026-01-31T12:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
