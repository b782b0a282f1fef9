"""Atomic file writes, notes that may be damaged, hashes and timestamps."""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from data.storage.errors import UserError

log = logging.getLogger(__name__)
_DISK_ERRORS = (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC)
T = TypeVar("T")


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
            sync_file(unfinished)
        os.replace(unfinished, path)
    except BaseException as error:
        with suppress(OSError):  # a read-only folder allows no removal either
            _remove(unfinished)
        if isinstance(error, OSError):
            _name_target(error, unfinished, path)
        raise
    if durable:
        sync_folder(path.parent)


def check_writable(path: Path) -> None:
    """Refuse a file or folder that cannot be made; call it before any work is done. Missing folders will be made.

    Raises:
        UserError: its folder is not one, or cannot be written.
    """
    place = path.absolute() if path.is_dir() else path.absolute().parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UserError(f"cannot write {path}: {place} is no folder; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: the folder {place} cannot be written; choose another place")


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write or replace a JSON file, atomically and durably."""
    with replaced(file, durable=True, draft=f"{file.name}.unfinished") as draft:
        draft.write_bytes(json_bytes(content))


def json_bytes(content: dict[str, Any]) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def read_note(file: Path, parse: Callable[[bytes], T]) -> T | None:
    """Read a file that is only a note: work continues without it, so it must never end the work.

    Args:
        file: if it is damaged or cannot be read, this is logged, and the file is renamed, see `set_aside`.
        parse: returns the note; raises ValueError, TypeError, KeyError or AttributeError if it is damaged.

    Returns:
        The note; None if the file is missing or was set aside.
    """
    try:
        return parse(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        aside = set_aside(file)
        where = f"kept as {aside.name}" if aside else "it stays where it is"
        log.warning("%s is damaged or cannot be read, and is ignored (%s): %s", file, where, error)
        return None


def set_aside(file: Path) -> Path | None:
    """Rename a file or folder to NAME.bad-TIME; returns its new path, or None if it is missing or cannot be renamed."""
    aside = file.with_name(f"{file.name}.bad-{time.time_ns()}")
    try:
        os.rename(file, aside)
    except OSError:
        return None
    return aside


def sync_file(file: Path) -> None:
    """Flush a file's content to the disk.

    Raises:
        OSError: it cannot be opened, or its file system cannot flush it.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk."""
    sync_file(folder)


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


def _name_target(error: OSError, draft: Path, target: Path) -> None:
    """Make an error name the file that it is about: a full disk names none, and nobody knows the draft."""
    if isinstance(error.filename, str):
        error.filename = error.filename.replace(str(draft), str(target))
    elif error.filename is None and error.errno in _DISK_ERRORS:
        error.filename = str(target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
