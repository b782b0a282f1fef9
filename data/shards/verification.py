"""Checks before training that all shards and offsets exist and match the index."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from data.shards.cache import cache_folder
from data.shards.index import DataFile, ShardIndex
from data.storage.files import replaced, sha256_of
from data.storage.location import DataError
from data.storage.remote import Storage

log = logging.getLogger(__name__)

_THREADS = 4
_LISTED = 5
READ_AGAIN_S = 30 * 24 * 3600
"""Age at which the last reading of a file counts no more: disks lose bits without a change of any timestamp."""
Stamp = list[int]
"""Bytes, modification time and change time in ns, and inode of a file. Programs can set back the modification time of
a file that they alter, but not its change time."""


def verify_shards(
    index: ShardIndex,
    *,
    by: Literal["hash", "size"],
    cache_directory: str | None,
    clock: Callable[[], float] = time.time,
) -> None:
    """Check every shard of a data set, and its offsets.

    Args:
        index: the data set. If remote, only presence and size are checked here; contents are checked after download.
        by: "hash" reads each local file once, and again after it has changed or `READ_AGAIN_S` later; "size" reads
            none.
        cache_directory: data.cache_directory; it holds the record of verified files.
        clock: seconds since 1970.

    Raises:
        DataError: files are missing or altered; names the first few and says what to do. Or others can write to the
            cache.
    """
    if index.is_remote or cache_directory is not None:
        cache_folder(cache_directory)
    if index.is_remote:
        found = Storage(index.location).sizes([file.name for file in index.files])
        bad = [_wrong_size(file, found.get(file.name, -1)) for file in index.files]
        _refuse(index, bad, "upload them again")
        return
    stamps = {file.name: _stamp(file, index.directory / file.name) for file in index.files}
    advice = "copy them again, or remove the folder and prepare the data set again"
    _refuse(index, [_wrong_size(file, stamps[file.name][0]) for file in index.files], advice)
    if by == "hash":
        record = _Record(index, cache_directory)
        now = int(clock())
        read_at = {name: at for name, (*stamp, at) in record.read().items() if stamp == stamps.get(name)}
        unread = [file for file in index.files if not 0 <= now - read_at.get(file.name, now + 1) < READ_AGAIN_S]
        if unread:
            size_gb = sum(file.num_bytes for file in unread) / 1e9
            log.info("checking the hashes of %d files, %.3g GB", len(unread), size_gb)
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash") as executor:
                bad = list(executor.map(lambda file: _wrong_hash(index.directory, file), unread))
            _refuse(index, bad, advice)
            # Stamps from before the reading: a file that changed meanwhile is read again next time.
            read_at |= {file.name: now for file in unread}
            record.write({name: [*stamp, read_at[name]] for name, stamp in stamps.items()})


def is_intact(directory: Path, file: DataFile) -> bool:
    """Whether a folder has a file as the index says, by its size and hash."""
    try:
        return (directory / file.name).stat().st_size == file.num_bytes and (
            sha256_of(directory / file.name) == file.sha256
        )
    except OSError:
        return False


def _stamp(file: DataFile, path: Path) -> Stamp:
    try:
        found = path.stat()
    except FileNotFoundError:
        return [-1, 0, 0, 0]
    except OSError as error:
        raise DataError(f"{file.title}: cannot read {path}: {error.strerror}") from None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _wrong_size(file: DataFile, found: int | None) -> str:
    """Fault of a file with `found` bytes (-1: missing, None: unknown); empty if none is known."""
    if found is None or found == file.num_bytes:
        return ""
    return f"{file.title} is missing" if found < 0 else f"{file.title} has {found} bytes instead of {file.num_bytes}"


def _wrong_hash(directory: Path, file: DataFile) -> str:
    try:
        found = sha256_of(directory / file.name)
    except OSError as error:
        return f"{file.title} cannot be read ({error.strerror})"
    return "" if found == file.sha256 else f"{file.title} was altered, its SHA-256 is {found} instead of {file.sha256}"


def _refuse(index: ShardIndex, findings: Iterable[str], advice: str) -> None:
    """Raise if there are faults."""
    bad = [finding for finding in findings if finding]
    if bad:
        more = f", and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        raise DataError(
            f"{len(bad)} of {len(index.files)} files in {index.shown_location} are missing or altered: "
            f"{', '.join(bad[:_LISTED])}{more}; {advice}"
        )


class _Record:
    """A small file with the stamps of the files whose hashes were right, and the second since 1970 of the reading."""

    def __init__(self, index: ShardIndex, cache_directory: str | None) -> None:
        self._cache_directory = cache_directory
        # Copies of a data set in several places have the same digest.
        place = hashlib.sha256(os.fsencode(index.directory.resolve())).hexdigest()
        self._name = f"{index.digest}-{place[:16]}.json"

    def read(self) -> dict[str, Stamp]:
        """Stamp and second by file; without what is not valid."""
        try:
            content = json.loads((self._folder() / self._name).read_bytes())
        except (OSError, ValueError):
            return {}
        entries = content.items() if isinstance(content, dict) else ()
        return {name: entry for name, entry in entries if _is_entry(entry)}

    def write(self, entries: dict[str, Stamp]) -> None:
        """Replace the file; a failure is only logged."""
        try:
            folder = self._folder()
            folder.mkdir(parents=True, exist_ok=True)
            with replaced(folder / self._name) as draft:
                draft.write_text(json.dumps(entries))
        except (OSError, DataError) as error:
            log.warning("the hashes are right, but will be checked again at the next start: %s", error)

    def _folder(self) -> Path:
        return cache_folder(self._cache_directory) / "verified"


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 5 and all(isinstance(number, int) for number in entry)
