"""Files of a data set: in its own folder, or in a cache of downloads."""

import logging
import math
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

from data.shards.cache import CacheDirectory, DownloadingError, NoRoomError, cache_folder
from data.shards.index import DataFile, Offsets, Shard, ShardIndex
from data.storage.files import sha256_of
from data.storage.location import DataError
from data.storage.remote import AbandonedError, Advance, Storage

log = logging.getLogger(__name__)

_GB = 10**9
_WINDOWS = 3
_DOWNLOADS = 2
_OFFSETS_REQUESTS = 8
"""Offsets downloaded at once: they are small, so the time of a request counts more than the bytes."""
_CLOSE_S = 5.0


class ShardFiles(Protocol):
    """Provides local files of a data set."""

    def open(self, file: DataFile) -> int:
        """A descriptor of the complete file, open for reading; the caller closes it.

        Raises:
            DataError: the file is missing, or does not match the index.
        """
        ...

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Announce the shards that will be opened next, in order; return at once. Their offsets come first."""
        ...

    def close(self) -> None:
        """Stop prefetching. Open descriptors stay usable."""
        ...


class LocalShards:
    """Shards in a folder of this host's filesystem, read in place."""

    def __init__(self, index: ShardIndex) -> None:
        self._directory = index.directory

    def open(self, file: DataFile) -> int:
        """See `ShardFiles`."""
        path = self._directory / file.name
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(
                f"{file.title}: cannot open {path}: {error.strerror}; copy it again or prepare the data again"
            ) from None

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class CachedShards:
    """Shards at a URL, downloaded to a bounded folder that the processes of a host share."""

    def __init__(self, index: ShardIndex, directory: Path, capacity_bytes: int) -> None:
        """Download nothing yet.

        Args:
            index: a remote data set.
            directory: the cache; made if missing.
            capacity_bytes: bound on all files in it, including other data sets.

        Raises:
            DataError: the folder cannot be used, or cannot hold even one shard.
        """
        _check_room(index, capacity_bytes, window_shards=None)
        self._storage = Storage(index.location)
        self._cache = CacheDirectory(directory, capacity_bytes)
        self._changed = threading.Condition()
        self._wanted: tuple[DataFile, ...] = ()
        self._failed: set[DataFile] = set()
        self._is_new = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, file: DataFile) -> int:
        """See `ShardFiles`. Download the file, or wait for another process to do so."""
        descriptor = self._cache.open(file)
        if descriptor is None:
            descriptor = self._cache.add(file, partial(fetch, self._storage, file), needed=self._wanted)
        return descriptor

    def prefetch(self, shards: Sequence[Shard]) -> None:
        """See `ShardFiles`. Each call replaces the list. Prefetched shards never evict each other."""
        with self._changed:
            self._wanted = tuple(file for shard in shards for file in shard.files)
            self._is_new = True
            self._changed.notify()
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._prefetch, name="prefetch-shards", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """See `ShardFiles`. Prefetching downloads are abandoned."""
        with self._changed:
            self._closed.set()
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _prefetch(self) -> None:
        """The thread: fetch one list after another, trying each file once."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_new or self._closed.is_set())
                self._is_new = False
                wanted = self._wanted
            if self._closed.is_set():
                return
            fetch = partial(self._fetch_ahead, wanted=wanted)
            # Offsets first: no sample can be read without them.
            with ThreadPoolExecutor(_OFFSETS_REQUESTS, thread_name_prefix="prefetch-offsets") as executor:
                list(executor.map(fetch, (file for file in wanted if isinstance(file, Offsets))))
            for shard in (file for file in wanted if isinstance(file, Shard)):
                if not fetch(shard):
                    break

    def _fetch_ahead(self, file: DataFile, *, wanted: Sequence[DataFile]) -> bool:
        """Fetch a file unless it is in the cache; False ends the list."""
        if self._closed.is_set() or self._is_new:
            return False
        if file in self._failed or self._cache.holds(file):
            return True
        try:
            fill = partial(fetch, self._storage, file, stop=self._closed)
            os.close(self._cache.add(file, fill, needed=wanted, wait=False))
        except DownloadingError:
            pass
        except (NoRoomError, AbandonedError):
            return False
        except DataError as error:
            self._failed.add(file)
            log.warning("fetching ahead: %s. It is tried again when it is read", error)
        return True


def fetch(
    storage: Storage,
    file: DataFile,
    target: Path,
    *,
    stop: threading.Event | None = None,
    advance: Advance | None = None,
) -> None:
    """Download a file of a data set and check its hash.

    Args:
        storage: folder of the data set.
        file: its entry in the index.
        target: local file, overwritten; it may be incomplete if this fails.
        stop: ends the transfer when set.
        advance: told of the bytes.

    Raises:
        DataError: it cannot be read, or is not what the index says.
        AbandonedError: `stop` was set.
        OSError: the local file cannot be written.
    """
    found = ""
    for attempt in range(_DOWNLOADS):
        storage.download(file.name, target, num_bytes=file.num_bytes, stop=stop, advance=advance)
        found = sha256_of(target)
        if found == file.sha256:
            return
        if advance is not None:
            advance(-file.num_bytes)
        if attempt + 1 < _DOWNLOADS:
            log.warning("%s: what arrived has another SHA-256 than the index says; once more", file.title)
    raise DataError(
        f"{file.title}: {storage.url}/{file.name} was altered: its SHA-256 is {found}, the "
        f"index says {file.sha256}; upload it again"
    )


def shard_files(index: ShardIndex, *, cache_directory: str | None, cache_gb: float) -> ShardFiles:
    """The files of a data set.

    Args:
        index: the data set.
        cache_directory: folder for shards of a remote data set; None: a folder of this user among the temporary files.
        cache_gb: bound on that folder, in 10^9 bytes.

    Raises:
        DataError: the folder cannot be used, or cannot hold even one shard.
    """
    if not index.is_remote:
        return LocalShards(index)
    return CachedShards(index, cache_folder(cache_directory), int(cache_gb * _GB))


def required_bytes(index: ShardIndex, window_shards: int) -> int:
    """Room for three windows of the largest shards with their offsets, or for all shards: the current window, the next
    one, and one that slower ranks hold."""
    largest = sorted(map(_num_bytes, index.shards), reverse=True)
    return sum(largest[: _WINDOWS * window_shards])


def _num_bytes(shard: Shard) -> int:
    return sum(file.num_bytes for file in shard.files)


def check_room(index: ShardIndex, *, cache_gb: float, window_shards: int) -> None:
    """Refuse a cache that open shards would fill.

    Args:
        index: the data set; a local one needs no cache.
        cache_gb: bound on the cache, in 10^9 bytes.
        window_shards: data.shuffle_window_shards.

    Raises:
        DataError: it is too small; names the required size.
    """
    if index.is_remote:
        _check_room(index, int(cache_gb * _GB), window_shards=window_shards)


def _check_room(index: ShardIndex, capacity_bytes: int, *, window_shards: int | None) -> None:
    """Like `check_room`; without `window_shards` only for the largest shard."""
    if window_shards is None:
        needed, what = max(map(_num_bytes, index.shards)), "its largest shard"
    else:
        needed = required_bytes(index, window_shards)
        what = f"{_WINDOWS} windows of data.shuffle_window_shards={window_shards} shards"
    if needed > capacity_bytes:
        needed_gb = math.ceil(needed / _GB * 1000) / 1000
        raise DataError(
            f"data.cache_gb is {capacity_bytes / _GB:g}, but {what} of {index.shown_location} take {needed_gb:g}: "
            f"set data.cache_gb to {needed_gb:g} or more"
        )
