"""Checks before training that all shards and offsets exist and match the index."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
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
Stamp = list[int]
"""Bytes, modification time in ns and inode of a file: if they are unchanged, so is its content."""


def verify_shards(index: ShardIndex, *, by: Literal["hash", "size"], cache_directory: str | None) -> None:
    """Check every shard of a data set, and its offsets.

    Args:
        index: the data set. If remote, only presence and size are checked here; contents are checked after download.
        by: "hash" reads each local file once, and again only after it has changed; "size" reads none.
        cache_directory: data.cache_directory; it holds the record of verified files.

    Raises:
        DataError: files are missing or altered; names the first few and says what to do.
    """
    if index.is_remote:
        found = Storage(index.location).sizes([file.name for file in index.files])
        bad = [_wrong_size(file, found.get(file.name, -1)) for file in index.files]
        _refuse(index, bad, "upload them again")
        return
    stamps = {file: _stamp(file, index.directory / file.name) for file in index.files}
    advice = "copy them again, or remove the folder and prepare the data set again"
    _refuse(index, [_wrong_size(file, stamp[0]) for file, stamp in stamps.items()], advice)
    if by == "hash":
        record = _Record(index, cache_directory)
        known = record.read()
        unread = [file for file, stamp in stamps.items() if known.get(file.name) != stamp]
        if unread:
            size_gb = sum(file.num_bytes for file in unread) / 1e9
            log.info("checking the hashes of %d files, %.3g GB", len(unread), size_gb)
            with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash") as executor:
                bad = list(executor.map(lambda file: _wrong_hash(index.directory, file), unread))
            _refuse(index, bad, advice)
            # Stamps from before the reading: a file that changed meanwhile is read again next time.
            record.write({file.name: stamp for file, stamp in stamps.items()})


def _stamp(file: DataFile, path: Path) -> Stamp:
    try:
        found = path.stat()
    except FileNotFoundError:
        return [-1, 0, 0]
    except OSError as error:
        raise DataError(f"{file.title}: cannot read {path}: {error.strerror}") from None
    return [found.st_size, found.st_mtime_ns, found.st_ino]


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
    """A small file with the stamps of the files whose hashes were right."""

    def __init__(self, index: ShardIndex, cache_directory: str | None) -> None:
        self._cache_directory = cache_directory
        # Copies of a data set in several places have the same digest.
        place = hashlib.sha256(os.fsencode(index.directory.resolve())).hexdigest()
        self._name = f"{index.digest}-{place[:16]}.json"

    def read(self) -> dict[str, Stamp]:
        """Stamp by file; empty without a valid record."""
        try:
            content = json.loads((self._folder() / self._name).read_bytes())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write(self, stamps: dict[str, Stamp]) -> None:
        """Replace the file; a failure is only logged."""
        try:
            folder = self._folder()
            folder.mkdir(parents=True, exist_ok=True)
            with replaced(folder / self._name) as draft:
                draft.write_text(json.dumps(stamps))
        except (OSError, DataError) as error:
            log.warning("the hashes are right, but will be checked again at the next start: %s", error)

    def _folder(self) -> Path:
        return cache_folder(self._cache_directory) / "verified"
