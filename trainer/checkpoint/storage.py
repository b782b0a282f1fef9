"""Where checkpoints are stored: a local or shared folder, or a folder of remote storage (s3 or other fsspec)."""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from data.storage.files import replaced, sha256_of, sync_folder
from data.storage.location import DataError, is_remote, local_path
from trainer.checkpoint.bucket import RemoteStorage
from trainer.checkpoint.format import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    NewerFormatError,
    UnreadableError,
    checkpoint_name,
    folder_names,
    list_checkpoints,
    parse_manifest,
    step_of,
)
from trainer.config.io import load_stored
from trainer.config.train_config import TrainConfig
from trainer.engine.ranks import Ranks

log = logging.getLogger(__name__)


class CheckpointStorage(Protocol):
    """A place for checkpoints. It raises `CheckpointError`, or OSError for failures that may be temporary."""

    shown: str
    """The place, without passwords."""
    location: str
    """The place, as `open_storage` takes it."""
    copies: bool
    """Whether `fetch` makes a copy on this host."""

    def list(self) -> list[Checkpoint]:
        """Checkpoints with a readable manifest, oldest first; an unreadable manifest is logged."""
        ...

    def check_sizes(self, checkpoint: Checkpoint) -> None:
        """See `Checkpoint.check_sizes`."""
        ...

    def fetch(self, checkpoint: Checkpoint) -> Checkpoint:
        """Get the checkpoint in a local folder, verified; downloads it if needed. `forget` removes the copy.

        Raises:
            UnreadableError: a file cannot be read at present.
            CheckpointError: a file is missing or differs.
        """
        ...

    def place(self, name: str) -> Path:
        """The local folder in which `fetch` puts the checkpoint of that name."""
        ...

    def forget(self) -> None:
        """Remove what `fetch` downloaded."""
        ...

    def names(self) -> Iterable[str]:
        """Names of all checkpoint folders, complete or not, oldest first."""
        ...

    def write(self, checkpoint: str, name: str, chunks: Iterable[memoryview]) -> None:
        """Write a part durably. An existing file of that name is replaced, never written into."""
        ...

    def confirm(self, checkpoint: str, name: str, sha256: str) -> None:
        """Read a part back, where the storage does not itself check what arrives; OSError if it differs."""
        ...

    def commit(self, checkpoint: str, manifest: bytes) -> None:
        """Write the manifest durably and atomically."""
        ...

    def manifest(self, checkpoint: str) -> bytes | None:
        """The bytes of a manifest; None if there is none."""
        ...

    def delete(self, checkpoint: str) -> None:
        """Delete a checkpoint, the manifest first, so that a partial one is never taken as valid."""
        ...

    def set_aside(self, checkpoint: str, folder: str) -> None:
        """Move a checkpoint into a folder of the storage, where it is no checkpoint of the run any more."""
        ...

    def tidy(self, checkpoint: Checkpoint) -> None:
        """Delete files in its folder that are not in its manifest."""
        ...

    def check_writable(self) -> None:
        """Write something and remove it again."""
        ...


class FolderStorage:
    """A folder that every rank can access."""

    copies = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shown = self.location = str(folder)

    def list(self) -> list[Checkpoint]:
        """See `CheckpointStorage`."""
        return list_checkpoints(self.folder)

    def check_sizes(self, checkpoint: Checkpoint) -> None:
        """See `CheckpointStorage`."""
        checkpoint.check_sizes()

    def fetch(self, checkpoint: Checkpoint) -> Checkpoint:
        """See `CheckpointStorage`. Makes no copy."""
        checkpoint.verify()
        return checkpoint

    def place(self, name: str) -> Path:
        """See `CheckpointStorage`."""
        return self.folder / name

    def forget(self) -> None:
        """Nothing to do."""

    def names(self) -> Iterable[str]:
        """See `CheckpointStorage`."""
        return folder_names(self.folder)

    def write(self, checkpoint: str, name: str, chunks: Iterable[memoryview]) -> None:
        """See `CheckpointStorage`."""
        file = self.folder / checkpoint / name
        file.parent.mkdir(parents=True, exist_ok=True)
        # A process wrongly believed dead may still write to the old file of that name; the new file is separate.
        file.unlink(missing_ok=True)
        _write_durably(file, chunks)

    def confirm(self, checkpoint: str, name: str, sha256: str) -> None:
        """See `CheckpointStorage`. `_write_durably` has dropped the file from the page cache."""
        if sha256_of(self.folder / checkpoint / name) != sha256:
            raise OSError(errno.EIO, f"{checkpoint}/{name} does not hold what was written to it")

    def commit(self, checkpoint: str, manifest: bytes) -> None:
        """See `CheckpointStorage`."""
        folder = self.folder / checkpoint
        with replaced(folder / MANIFEST, durable=True) as draft:
            draft.write_bytes(manifest)
            sync_folder(folder)  # for the parts' names
        sync_folder(self.folder)

    def manifest(self, checkpoint: str) -> bytes | None:
        """See `CheckpointStorage`."""
        try:
            return (self.folder / checkpoint / MANIFEST).read_bytes()
        except FileNotFoundError:
            return None

    def delete(self, checkpoint: str) -> None:
        """See `CheckpointStorage`."""
        path = self.folder / checkpoint
        if path.is_symlink() or not path.is_dir():
            raise OSError(errno.ENOTDIR, f"{path} is no folder of a checkpoint")
        (path / MANIFEST).unlink(missing_ok=True)
        sync_folder(path)  # else a crash of the host could bring the manifest back without the parts
        shutil.rmtree(path)

    def set_aside(self, checkpoint: str, folder: str) -> None:
        """See `CheckpointStorage`."""
        (self.folder / folder).mkdir(exist_ok=True)
        os.rename(self.folder / checkpoint, self.folder / folder / checkpoint)
        sync_folder(self.folder)

    def tidy(self, checkpoint: Checkpoint) -> None:
        """See `CheckpointStorage`."""
        for file in checkpoint.path.iterdir():
            if file.name != MANIFEST and file.name not in checkpoint.manifest["files"]:
                file.unlink()

    def check_writable(self) -> None:
        """See `CheckpointStorage`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder):
            pass


def open_storage(location: str | Path, *, owner: str | None = None) -> CheckpointStorage:
    """The storage at a folder or URL; accesses nothing yet.

    Args:
        location: folder or URL.
        owner: processes with the same owner share their host's copies of remote checkpoints; None: not shared.

    Raises:
        CheckpointError: the URL is not a storage URL.
    """
    try:
        if is_remote(location):
            return RemoteStorage(str(location), owner=owner)
        return FolderStorage(local_path(location))
    except DataError as error:
        raise CheckpointError(f"checkpoint.directory: {error}") from error


def storage_of(config: TrainConfig) -> CheckpointStorage:
    """Where a run's checkpoints are stored."""
    return open_storage(config.checkpoint.directory or Path(config.run.directory) / "checkpoints", owner="run")


def storage_of_run(run: Path, *, owner: str | None = None) -> CheckpointStorage:
    """Where the checkpoints of the run in a directory are stored, according to its config.

    Args:
        run: the directory.
        owner: as in `open_storage`.

    Raises:
        CheckpointError: it is not the directory of a run.
        ConfigError: its config cannot be read.
    """
    if (run / "checkpoints").is_dir():
        return FolderStorage(run / "checkpoints")
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run} is not the directory of a run: it has neither checkpoints nor config.yaml")
    elsewhere = load_stored(run / "config.yaml").checkpoint.directory
    if elsewhere is None:
        raise CheckpointError(f"{run} holds no checkpoint yet")
    return open_storage(elsewhere, owner=owner)


def shown_checkpoint(config: TrainConfig, step: int) -> str:
    """Where the checkpoint of `step` is, for messages."""
    return f"{storage_of(config).shown}/{checkpoint_name(step)}"


@dataclass
class Survey:
    """What a search for the newest valid checkpoint has found.

    Attributes:
        newest: the newest valid one, or None.
        problems: what is wrong with each newer one, by name.
        unreadable: whether one of these cannot be read at present, or not by this version, and so may be intact.
    """

    newest: Checkpoint | None = None
    problems: dict[str, str] = field(default_factory=dict)
    unreadable: bool = False


def survey(storage: CheckpointStorage, *, fetch: bool) -> Survey:
    """Search for the newest valid checkpoint. Folders without a manifest are saves that never ended: no problem.

    Args:
        storage: of the checkpoints.
        fetch: download and verify it; otherwise only file sizes are compared in remote storage.

    Raises:
        UnreadableError: the storage itself cannot be read, so its contents are unknown.
    """
    found = Survey()
    try:
        names = sorted(storage.names(), key=step_of, reverse=True)
    except OSError as error:
        raise UnreadableError(f"checkpoints cannot be read: {error}") from error
    for name in names:
        try:
            content = storage.manifest(name)
            if content is None:
                continue
            checkpoint = Checkpoint(storage.place(name), parse_manifest(content, name))
            if fetch or not storage.copies:
                checkpoint = storage.fetch(checkpoint)
            else:
                storage.check_sizes(checkpoint)
            found.newest = checkpoint
            return found
        except UnreadableError as error:
            found.unreadable, problem = True, str(error)
        except (OSError, NewerFormatError) as error:
            found.unreadable, problem = True, f"it cannot be read: {error}"
        except CheckpointError as error:
            problem = str(error)
        except ValueError as error:
            problem = f"its manifest is damaged: {error}"
        found.problems[name] = problem.removeprefix(f"{storage.shown}/{name}/")
        log.warning("passing over checkpoint %s: %s", name, problem)
        if found.unreadable and storage.copies:  # a service that fails now would fail for each
            break
    return found


def newest_fetched(storage: CheckpointStorage) -> Checkpoint | None:
    """The newest valid checkpoint, in a local folder; damaged ones are logged and skipped.

    Raises:
        UnreadableError: the storage or a newer checkpoint cannot be read at present, so the newest is unknown.
    """
    return _newest(survey(storage, fetch=True))


def newest_seen(storage: CheckpointStorage) -> Checkpoint | None:
    """Like `newest_fetched`, but downloads nothing: for remote storage, only the file sizes are compared."""
    return _newest(survey(storage, fetch=False))


def _newest(found: Survey) -> Checkpoint | None:
    if found.unreadable:
        raise UnreadableError("checkpoints cannot be read: " + "; ".join(found.problems.values()))
    return found.newest


def find_checkpoint(storage: CheckpointStorage, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or the newest valid one; in a local folder, verified.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged; lists the existing ones.
    """
    if step is None:
        newest = newest_fetched(storage)
        if newest is None:
            raise CheckpointError(f"{storage.shown} holds no valid checkpoint yet")
        return newest
    found = {checkpoint.step: checkpoint for checkpoint in storage.list()}
    if step not in found:
        raise CheckpointError(f"{storage.shown} has no checkpoint of step {step}; it has {sorted(found) or 'none'}")
    return storage.fetch(found[step])


def fetch_for_ranks(
    storage: CheckpointStorage,
    find: Callable[[], Checkpoint | None],
    ranks: Ranks,
    refusal: type[CheckpointError] = CheckpointError,
) -> Checkpoint | None:
    """What rank 0 finds, in a folder that this rank can read; a copy is made once on each host. A collective.

    Args:
        storage: of the checkpoints; of remote ones, the ranks of a host share their copy by the same `owner`.
        find: finds and fetches the checkpoint, on rank 0.
        ranks: that will read it.
        refusal: what `find` raises.

    Raises:
        CheckpointError: on every rank: `refusal` if rank 0 finds none that can be used, or if a host cannot get it.
        OSError: on every rank, if the storage fails now.
    """
    found = ranks.all_do(lambda: find() if ranks.rank == 0 else None, refusal, OSError)
    # Only the name is the same on all hosts.
    name, manifest = ranks.broadcast((found.path.name, found.manifest) if found else (None, {}))
    if name is None:
        return None
    if storage.copies:
        wanted, fetches = Checkpoint(Path(name), manifest), ranks.rank > 0 and ranks.is_first_of_host
        ranks.all_do(lambda: storage.fetch(wanted) if fetches else None, CheckpointError, OSError)
    return Checkpoint(storage.place(name), manifest)


def forget_for_ranks(storage: CheckpointStorage, ranks: Ranks) -> None:
    """Remove the copies of `fetch_for_ranks`, once every rank has read them. A collective."""
    ranks.gather(None)
    if ranks.is_first_of_host:
        storage.forget()


def _write_durably(file: Path, chunks: Iterable[memoryview]) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            while chunk:
                chunk = chunk[os.write(descriptor, chunk) :]
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read back from the disk
    finally:
        os.close(descriptor)
