"""Files that appear as a whole, hashes of them, and the time."""

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
    """Give a name next to `path` to write a file or folder under, and put that in its place at the end.

    A reader sees what was at `path` before, or all that is written. If anything fails, what was there stays and the
    draft is removed. The folder must exist.

    Args:
        path: file, replaced if it exists; or a folder, which must be empty or not exist.
        durable: whether the content of a file and its name are on the disk when this ends, even if the host crashes.
        draft: name to write under; by default one that no other process of this host has.

    Raises:
        OSError: the draft cannot be put in place, or not be flushed to the disk.
    """
    unfinished = path.with_name(draft or f".{path.name}.{os.getpid()}.tmp")
    _remove(unfinished)  # a process that still writes to a file of that name keeps that one, unseen
    try:
        yield unfinished
        if durable:
            _sync(unfinished, os.O_RDONLY)
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):  # where nothing may be written, nothing may be removed either
            _remove(unfinished)
        raise
    if durable:
        sync_folder(path.parent)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write or replace a JSON file: on the disk as a whole, or the one that was there before."""
    with replaced(file, durable=True, draft=f"{file.name}.unfinished") as draft:
        draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sha256_of(file: Path | int) -> str:
    """SHA-256 of a file, by path or by descriptor, which stays open; 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with open(os.dup(file) if isinstance(file, int) else file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def timestamp() -> str:
    """Now, in UTC, to the second: 2026-01-31T12:00:00Z."""
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
