"""Copies of remote files in the user's cache folder: continued after a stop, and verified before they are named."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.storage.files import sha256_of, sync_file
from data.storage.location import DataError
from data.storage.paths import user_cache
from data.storage.redaction import redact
from data.storage.remote_folder import RemoteFile, RemoteFolder

Report = Callable[[str, int, int], None]
"""Told the name of a file, how many of its bytes have arrived, and how many it has."""


def no_report(name: str, num_bytes: int, size: int) -> None:
    """Tells nobody."""


def downloads_folder() -> Path:
    """Where downloads are kept, see `user_cache`."""
    return user_cache("sources")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder if it is missing, and keep other processes from writing to it.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def download(
    storage: RemoteFolder,
    name: str,
    target: Path,
    *,
    remote: RemoteFile,
    sha256: str | None = None,
    report: Report = no_report,
) -> None:
    """Copy a file, or the rest of it.

    Args:
        storage: the folder of the file.
        name: its name there.
        target: where it belongs; its folder is made. A copy of this version that is already there stays.
        remote: what the storage says about it; a version that it had before is not mixed with this one.
        sha256: of its content, None if it is unknown.
        report: is told the progress.

    Raises:
        DataError: it cannot be read, or is another file.
        OSError: it cannot be written.
    """
    size = remote.num_bytes
    version = hashlib.sha256(f"{storage.url} {name} {size} {remote.version}".encode()).hexdigest()[:16]
    note = target.with_name(f".{target.name}.version")
    if sha256 is None and target.is_file() and note.is_file() and note.read_text() == version:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{version}.part")
    for other in target.parent.glob(f".{target.name}.*.part"):
        if other != part:
            other.unlink()
    report(name, 0, size or 0)
    if size is None:
        storage.download(name, part)
    else:
        storage.resume(name, part, num_bytes=size, report=lambda held: report(name, held, size))
    if sha256 is not None and (found := sha256_of(part)) != sha256:
        part.unlink()
        raise DataError(
            f"{redact(storage.url)}/{name} has the SHA-256 {found}, which is not that of the published file, {sha256}"
        )
    sync_file(part)
    os.replace(part, target)
    if sha256 is None:
        note.write_text(version)
