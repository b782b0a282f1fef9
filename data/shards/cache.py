"""A bounded folder of downloaded shards and offsets that all processes of a host share.

It holds, for a file with SHA-256 h of n bytes:

    h.tar       or h.offsets: the complete, verified file, renamed into place; its modification time is when it was last
                opened
    h.n.part    the download so far; n bytes count as taken as soon as the file exists
    h.lock      locked by the downloading process; a part without a locked h.lock is a leftover
    lock        locked briefly while room is made or a file is renamed

All locks are flocks: they end with the process, however it ends. Each open descriptor of a file holds a shared lock.
Only a file that can be locked exclusively is evicted.

A file may have been altered or planted since its download. So it is hashed before it is opened, unless this process has
already done so, or another process has it open and thus has done so. Meanwhile it is locked exclusively: a second
process waits for the first, and does not read the file again.
"""

import errno
import fcntl
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.shards.index import OFFSETS_SUFFIX, DataFile
from data.storage.files import sha256_of
from data.storage.location import DataError
from data.storage.paths import expanded

log = logging.getLogger(__name__)

WAIT_FOR_ROOM_S = 600.0
"""Longest wait for room while other processes hold everything open."""
_POLL_S = 0.1
# The folder may hold other files too; they are not ours to remove.
_FILE = re.compile(rf"[0-9a-f]{{64}}(\.tar|{re.escape(OFFSETS_SUFFIX)})")
_PART = re.compile(r"([0-9a-f]{64})\.([0-9]+)\.part")


class NoRoomError(Exception):
    """The bound leaves no room at present."""


class DownloadingError(Exception):
    """Another process is downloading the file."""


def cache_folder(configured: str | None) -> Path:
    """The folder that data.cache_directory names; by default a private folder among the temporary files.

    Raises:
        DataError: it belongs to somebody else, or others may write to it, and could plant shards there; or the default
            folder cannot be made.
    """
    directory = Path(tempfile.gettempdir()) / f"ddgan-shards-{os.getuid()}"
    if configured is not None:
        directory = Path(expanded(configured, "data.cache_directory")).absolute()
    try:
        if configured is None:
            with suppress(FileExistsError):
                directory.mkdir(mode=0o700)
        # Anyone may make a link among the temporary files.
        found = directory.lstat() if configured is None else directory.stat()
    except (FileNotFoundError, NotADirectoryError):
        return directory  # it is made, or refused, when it is needed
    except OSError as error:
        raise DataError(f"cannot use {directory}: {error.strerror}; set data.cache_directory") from None
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid():
        raise DataError(f"{directory} is not your own folder: remove it, or set data.cache_directory to another one")
    if stat.S_ISDIR(found.st_mode) and found.st_mode & 0o022:
        raise DataError(
            f"{directory} can be written by others, who could plant shards there: chmod go-w {directory}, or set "
            "data.cache_directory to another folder"
        )
    return directory


class CacheDirectory:
    """The folder. Many processes and threads may call every method at once."""

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        """Make the folder if it is missing, and remove leftovers of killed processes.

        Raises:
            DataError: it cannot be used.
        """
        self.directory = directory
        self._capacity_bytes = capacity_bytes
        self._hashed: set[tuple[int, int, int]] = set()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                self._taken_bytes()
        except OSError as error:
            raise DataError(
                f"data.cache_directory {directory} cannot be used: {error.strerror}; name a folder that you can write"
            ) from None

    def open(self, file: DataFile) -> int | None:
        """A descriptor of a file, which protects it from eviction; None if it is missing.

        Raises:
            DataError: the folder is no longer readable.
        """
        with self._errors_explained(file):
            return self._open(file)

    def holds(self, file: DataFile) -> bool:
        """Whether the file exists."""
        return self._path(file).exists()

    def add(
        self,
        file: DataFile,
        fill: Callable[[Path], None],
        *,
        needed: Collection[DataFile] = (),
        wait: bool = True,
    ) -> int:
        """Add a file, unless another process adds it meanwhile.

        Args:
            file: the shard or offsets.
            fill: writes it to a path and verifies it. If it raises, the error is passed on and nothing is left behind.
            needed: files that are evicted last, or never without `wait`.
            wait: wait for another process that downloads it, and for room.

        Returns:
            A descriptor as from `open`.

        Raises:
            DataError: no room became free in ten minutes, or the folder's disk is full.
            DownloadingError, NoRoomError: without `wait`.
        """
        with self._errors_explained(file), self._downloading(file, wait=wait):
            descriptor = self._open(file)
            if descriptor is not None:
                return descriptor
            part = self._reserve(file, needed, wait=wait)
            try:
                fill(part)
                with self._locked():
                    self._hashed.add(_identity(part.stat()))
                    part.rename(self._path(file))
                    # Before another process can evict it.
                    descriptor = self._open(file)
            finally:
                part.unlink(missing_ok=True)
            assert descriptor is not None, f"{self._path(file)} is gone"
            return descriptor

    def _path(self, file: DataFile) -> Path:
        return self.directory / f"{file.sha256}{Path(file.name).suffix}"

    def _open(self, file: DataFile) -> int | None:
        path = self._path(file)
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            opened = False
            try:
                is_right = self._is_right(descriptor, file)
                # From an exclusive lock this goes through none, so that the file may be evicted meanwhile.
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                there = os.fstat(descriptor).st_nlink > 0
                if opened := is_right and there:
                    with suppress(PermissionError):
                        os.utime(descriptor)
                    return descriptor
                if there:
                    log.warning("%s: its copy %s is damaged or altered and is removed", file.title, path)
                    path.unlink(missing_ok=True)
            finally:
                if not opened:
                    os.close(descriptor)

    def _is_right(self, descriptor: int, file: DataFile) -> bool:
        """Whether the content is that of the index; hashes it if nobody has it open and this process never did."""
        found = os.fstat(descriptor)
        if found.st_size != file.num_bytes:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        if _identity(found) not in self._hashed:
            if sha256_of(descriptor) != file.sha256:
                return False
            os.lseek(descriptor, 0, os.SEEK_SET)
            self._hashed.add(_identity(found))
        return True

    @contextmanager
    def _errors_explained(self, file: DataFile) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason, advice = error.strerror or str(error), "set data.cache_directory to another folder"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = f"no space left on its disk for {file.num_bytes} bytes"
                advice = "free some, set data.cache_directory to a larger disk, or lower data.cache_gb"
            raise DataError(f"{file.title}: cache {self.directory}: {reason}; {advice}") from None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder."""
        descriptor = _lock(self.directory / "lock", wait=True)
        assert descriptor is not None
        try:
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _downloading(self, file: DataFile, *, wait: bool) -> Iterator[None]:
        """Hold the lock of a file's download."""
        lock = self.directory / f"{file.sha256}.lock"
        descriptor = _lock(lock, wait=wait)
        if descriptor is None:
            raise DownloadingError
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            os.close(descriptor)

    def _reserve(self, file: DataFile, needed: Collection[DataFile], *, wait: bool) -> Path:
        """Reserve room for a file: an empty file whose name has the size."""
        deadline = time.monotonic() + WAIT_FOR_ROOM_S
        part = self.directory / f"{file.sha256}.{file.num_bytes}.part"
        # A leftover would count as taken, since this process now holds its lock.
        part.unlink(missing_ok=True)
        while True:
            with self._locked():
                if self._make_room(file.num_bytes, needed, evict_needed=wait):
                    part.touch(mode=0o600)
                    return part
            if not wait:
                raise NoRoomError
            if time.monotonic() > deadline:
                raise DataError(
                    f"{file.title}: the cache {self.directory} is full of shards that are open, and none was "
                    f"closed in {WAIT_FOR_ROOM_S:g} s: raise data.cache_gb ({self._capacity_bytes / 1e9:g} now), or "
                    "lower data.shuffle_window_shards"
                )
            time.sleep(_POLL_S)

    def _make_room(self, num_bytes: int, needed: Collection[DataFile], *, evict_needed: bool) -> bool:
        """Evict files until `num_bytes` fit: the least recently opened first, needed ones last."""
        excess = self._taken_bytes() + num_bytes - self._capacity_bytes
        if excess <= 0:
            return True
        last = {self._path(file) for file in needed}
        for is_needed, _, size, file in sorted((found[-1] in last, *found) for found in self._files()):
            if is_needed and not evict_needed:
                break
            if _remove_unlocked(file, lock=file):
                excess -= size
            if excess <= 0:
                return True
        return False

    def _taken_bytes(self) -> int:
        """Bytes of all files, with downloads in progress at full size; removes leftovers."""
        taken = sum(size for _, size, _ in self._files())
        for file in self.directory.iterdir():
            part = _PART.fullmatch(file.name)
            if part and not _remove_unlocked(file, lock=self.directory / f"{part[1]}.lock"):
                taken += int(part[2])
        return taken

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Last use, bytes and path of each shard and offsets file."""
        for file in self.directory.iterdir():
            if _FILE.fullmatch(file.name):
                with suppress(FileNotFoundError):
                    found = file.stat()
                    yield found.st_mtime_ns, found.st_size, file


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_size


def _lock(file: Path, *, wait: bool) -> int | None:
    """Lock a file exclusively, created if missing; return its descriptor. Without `wait`: None if it is locked."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Its last owner may have removed it; a new file may exist and be locked by now.
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _remove_unlocked(file: Path, *, lock: Path) -> bool:
    """Remove a file and its lock, unless the lock is held."""
    descriptor = _lock(lock, wait=False)
    if descriptor is None:
        return False
    try:
        file.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
    return True
