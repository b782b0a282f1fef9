"""Where leases are kept: a file in the run's directory, and one in the storage of its checkpoints."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data.storage.files import replaced
from data.storage.location import DataError, is_remote, local_path
from data.storage.redaction import redact
from data.storage.writable import WritableStorage
from trainer.checkpoint.lease import Lease, LeaseError, LeasePlace, acquire
from trainer.config.train_config import TrainConfig

log = logging.getLogger(__name__)

LEASE = "lease.json"


class FolderLease:
    """A lease in a local or shared folder."""

    def __init__(self, folder: Path) -> None:
        self.shown = str(folder)
        self._folder = folder
        self._file = folder / LEASE
        self._made_folder = False

    def read(self) -> bytes | None:
        """See `LeasePlace`."""
        try:
            return self._file.read_bytes()
        except FileNotFoundError:
            return None

    def swap(self, seen: bytes | None, content: bytes) -> bool:
        """See `LeasePlace`. Writes a new file, so that late writes of the last holder go to the old one."""
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._made_folder = True
        with self._alone():
            if self.read() != seen:
                return False
            with replaced(self._file, durable=True) as draft:
                draft.write_bytes(content)
        return self.read() == content

    def beat(self, seen: bytes, content: bytes) -> bool:
        """See `LeasePlace`. Overwrites the file in place, so a full disk does not lose the lease."""
        try:
            descriptor = os.open(self._file, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if os.pread(descriptor, len(seen) + 1, 0) != seen:
                return False
            os.pwrite(descriptor, content, 0)
        finally:
            os.close(descriptor)
        return True

    def remove(self, seen: bytes) -> None:
        """See `LeasePlace`."""
        with self._alone():
            if self.read() != seen:
                return
            self._file.unlink()
            if self._made_folder:
                with suppress(OSError):  # removed only if it is empty
                    self._folder.rmdir()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Lock the folder. Some network filesystems have no locks; there, two swaps at the same moment can collide."""
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class BucketLease:
    """A lease in a bucket whose service supports conditional writes, as S3 does."""

    def __init__(self, storage: WritableStorage) -> None:
        self.shown = redact(storage.url)
        self._storage = storage

    def read(self) -> bytes | None:
        """See `LeasePlace`."""
        return self._storage.read_if_there(LEASE)

    def swap(self, seen: bytes | None, content: bytes) -> bool:
        """See `LeasePlace`."""
        version = self._storage.version(LEASE)
        if self.read() != seen or (version is None) != (seen is None):
            return False
        return self._storage.put_if(LEASE, content, version=version)

    def beat(self, seen: bytes, content: bytes) -> bool:
        """See `LeasePlace`."""
        return self.swap(seen, content)

    def remove(self, seen: bytes) -> None:
        """See `LeasePlace`."""
        if self.read() == seen:
            self._storage.remove([LEASE])


@dataclass(frozen=True)
class Claim:
    """The leases that a run holds."""

    leases: tuple[Lease, ...]
    """One for each place."""

    def check(self) -> None:
        """Check that all are still held; see `Lease.check`."""
        for lease in self.leases:
            lease.check()

    def release(self) -> None:
        """Release all of them; further calls do nothing."""
        for lease in self.leases:
            lease.release()


def claim(config: TrainConfig, launch: str) -> Claim:
    """Take the leases of a run.

    Args:
        config: config of the run.
        launch: launch of this process, see `lease.launch_id`.

    Raises:
        LeaseError: another run holds one, or a lease cannot be kept there.
    """
    return _claim(_places(config), launch)


def claim_folder(location: str, launch: str) -> Claim:
    """Take the lease of one folder or URL of checkpoints.

    Raises:
        LeaseError: a run holds it, or a lease cannot be kept there.
    """
    if is_remote(location):
        return _claim(_remote_places(location), launch)
    return _claim([FolderLease(local_path(location))], launch)


def _claim(places: list[LeasePlace], launch: str) -> Claim:
    held: list[Lease] = []
    for place in places:
        try:
            held.append(acquire(place, launch))
        except LeaseError:
            Claim(tuple(held)).release()
            raise
        except OSError as error:
            Claim(tuple(held)).release()
            raise LeaseError([f"{place.shown}: cannot keep a lease there: {error}"]) from error
    return Claim(tuple(held))


def _places(config: TrainConfig) -> list[LeasePlace]:
    run = Path(config.run.directory)
    checkpoints = config.checkpoint.directory or str(run / "checkpoints")
    if is_remote(checkpoints):
        return [FolderLease(run), *_remote_places(checkpoints)]
    folder = local_path(checkpoints)
    return [FolderLease(run), *([FolderLease(folder)] if folder.absolute() != run.absolute() else [])]


def _remote_places(url: str) -> list[LeasePlace]:
    try:
        storage = WritableStorage(url)
    except DataError as error:
        raise LeaseError([f"checkpoint.directory: {error}"]) from error
    if storage.has_versions:
        return [BucketLease(storage)]
    log.info("%s: this storage cannot keep a lease; nothing but run.directory's keeps two runs apart", redact(url))
    return []
