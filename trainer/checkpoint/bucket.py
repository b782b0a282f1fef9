"""Checkpoints in a folder of remote storage: s3, or another writable fsspec filesystem."""

import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from data.storage.location import DataError
from data.storage.redaction import redact
from data.storage.writable import StorageError, WritableStorage
from trainer.checkpoint.format import MANIFEST, Checkpoint, CheckpointError, is_checkpoint_name, parse_manifest

log = logging.getLogger(__name__)

_PROBE = "writable"


class RemoteStorage:
    """See `CheckpointStorage`. An object becomes visible only when it is complete, which makes a commit simple."""

    copies = True

    def __init__(self, url: str, *, owner: str | None = None) -> None:
        """Contacts nothing.

        Args:
            url: the folder.
            owner: processes with the same owner share the copies that `fetch` makes; None: not shared.

        Raises:
            DataError: the URL is not a storage URL.
        """
        self._storage = WritableStorage(url)
        self.location = self._storage.url
        self.shown = redact(self.location)
        digest = hashlib.sha256(self.location.encode()).hexdigest()[:16]
        self._local = (
            Path(tempfile.gettempdir()) / f"ddgan-checkpoints-{os.getuid()}" / f"{digest}-{owner or os.getpid()}"
        )

    def list(self) -> list[Checkpoint]:
        """See `CheckpointStorage`."""
        found: list[Checkpoint] = []
        for name in self.names():
            content = self.manifest(name)
            if content is None:
                continue
            try:
                found.append(Checkpoint(Path(name), parse_manifest(content, name)))
            except ValueError as error:
                log.warning("passing over %s/%s: its manifest cannot be read (%s)", self.shown, name, error)
        return found

    def check_sizes(self, checkpoint: Checkpoint) -> None:
        """See `CheckpointStorage`."""
        found, place = self._storage.files(), f"{self.shown}/{checkpoint.path.name}"
        for name, expected in checkpoint.manifest["files"].items():
            size = found.get(f"{checkpoint.path.name}/{name}")
            if size is None:
                raise CheckpointError(f"{place}/{name} is missing")
            if size != expected["bytes"]:
                raise CheckpointError(f"{place}/{name} has {size} bytes, its manifest says {expected['bytes']}")

    def fetch(self, checkpoint: Checkpoint) -> Checkpoint:
        """See `CheckpointStorage`."""
        self.check_sizes(checkpoint)
        _make_private(self._local.parent)
        local = Checkpoint(self.place(checkpoint.path.name), checkpoint.manifest)
        try:
            local.verify()  # downloaded by another rank of this host, or by an earlier start
            return local
        except CheckpointError:
            self.forget()
        local.path.mkdir(parents=True)
        for name, expected in checkpoint.manifest["files"].items():
            source = f"{checkpoint.path.name}/{name}"
            try:
                self._storage.download(source, local.path / name, num_bytes=expected["bytes"])
            except DataError as error:
                # The file exists, as its size has just shown; an older checkpoint must not be used instead.
                raise StorageError(str(error)) from error
        local.verify()
        return local

    def place(self, name: str) -> Path:
        """See `CheckpointStorage`."""
        return self._local / name

    def forget(self) -> None:
        """See `CheckpointStorage`."""
        shutil.rmtree(self._local, ignore_errors=True)

    def names(self) -> Iterable[str]:
        """See `CheckpointStorage`."""
        folders = {name.split("/")[0] for name in self._storage.files() if "/" in name}
        return sorted(filter(is_checkpoint_name, folders))

    def write(self, checkpoint: str, name: str, chunks: Iterable[memoryview]) -> None:
        """See `CheckpointStorage`."""
        self._storage.write(f"{checkpoint}/{name}", chunks)

    def confirm(self, checkpoint: str, name: str, sha256: str) -> None:
        """See `CheckpointStorage`. The service compares checksums of what arrives."""

    def commit(self, checkpoint: str, manifest: bytes) -> None:
        """See `CheckpointStorage`."""
        self._storage.put(f"{checkpoint}/{MANIFEST}", manifest)

    def manifest(self, checkpoint: str) -> bytes | None:
        """See `CheckpointStorage`."""
        return self._storage.read_if_there(f"{checkpoint}/{MANIFEST}")

    def delete(self, checkpoint: str) -> None:
        """See `CheckpointStorage`."""
        files = [name for name in self._storage.files() if name.startswith(f"{checkpoint}/")]
        manifest = f"{checkpoint}/{MANIFEST}"
        self._storage.remove(sorted(files, key=lambda name: name != manifest))

    def set_aside(self, checkpoint: str, folder: str) -> None:
        """See `CheckpointStorage`. The manifest moves last, so that an interrupted move can be repeated."""
        files = [name for name in self._storage.files() if name.startswith(f"{checkpoint}/")]
        manifest = f"{checkpoint}/{MANIFEST}"
        for name in sorted(files, key=lambda name: name == manifest):
            self._storage.copy(name, f"{folder}/{name}")
        self.delete(checkpoint)

    def tidy(self, checkpoint: Checkpoint) -> None:
        """See `CheckpointStorage`."""
        prefix = f"{checkpoint.path.name}/"
        known = {prefix + name for name in (MANIFEST, *checkpoint.manifest["files"])}
        self._storage.remove(n for n in self._storage.files() if n.startswith(prefix) and n not in known)

    def check_writable(self) -> None:
        """See `CheckpointStorage`."""
        self._storage.put(_PROBE, b"")
        self._storage.remove([_PROBE])


def _make_private(folder: Path) -> None:
    """Create a private folder, where nobody else can plant weights."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise CheckpointError(f"{folder} is not a folder that only you can write: remove it")
