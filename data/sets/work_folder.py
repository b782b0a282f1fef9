"""The hidden folder next to the target that holds unfinished work, so that a later run can resume."""

import contextlib
import errno
import fcntl
import os
import platform
import re
import shutil
from pathlib import Path
from types import TracebackType

from data.storage.errors import UserError
from data.storage.files import sync_folder

_LOCK_NAME = "lock"
_OWN_NAMES = re.compile(
    r"lock|journal\.json(\.unfinished)?"
    r"|set(/((\d{5,}\.(tar|offsets)|(index|origin)\.json)(\.unfinished)?|\.\d{5,}\.(tar|offsets)\.[0-9a-f]{16}\.tmp))?"
)
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""Errors of a file system without locks, such as Lustre by default."""


class OutputError(UserError):
    """The output folder cannot be used; the message says why and what to do."""


class WorkFolder:
    """`.NAME.unfinished` next to the target NAME, locked by one process at a time.

    A `with` statement creates it and missing parents, and locks it. The end releases the lock; the folder stays unless
    `publish` or `remove` was called. A killed process releases the lock too.
    """

    def __init__(self, target: Path) -> None:
        """Change nothing on the disk yet.

        Args:
            target: absolute path of the result; missing or an empty folder.
        """
        self._target = target
        self._lock = -1
        self._missing_parents = [parent for parent in target.parents if not parent.exists()]
        self.path = target.parent / f".{target.name}.unfinished"
        """The folder itself."""
        self.journal = self.path / "journal.json"
        """The journal."""
        self.result = self.path / "set"
        """The folder that becomes the target."""

    def __enter__(self) -> "WorkFolder":
        self._refuse_foreign()
        try:
            while not self._take():
                pass
            self.result.mkdir(exist_ok=True)
        except OSError:
            if self._lock >= 0:
                self.remove()
            self._remove_parents()
            raise
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._release()

    def discard(self, keep: frozenset[str] = frozenset()) -> None:
        """Remove the files of the result, except the named ones."""
        for file in self.result.iterdir():
            if file.name not in keep:
                file.unlink()

    def publish(self) -> None:
        """Rename the result to the target; remove everything else.

        Raises:
            OSError: the target was taken meanwhile; it is not touched.
        """
        self.result.rename(self._target)
        sync_folder(self._target.parent)
        self.remove()

    def remove(self) -> None:
        """Remove everything, including the parents made for it."""
        shutil.rmtree(self.result, ignore_errors=True)
        for file in (self.journal, self.journal.with_name(f"{self.journal.name}.unfinished")):
            file.unlink(missing_ok=True)
        # Last, so that nobody takes a half-removed folder. A process that takes it now notices that its lock is gone.
        (self.path / _LOCK_NAME).unlink(missing_ok=True)
        # On NFS, an open file keeps its name.
        self._release()
        with contextlib.suppress(OSError):
            self.path.rmdir()
        self._remove_parents()

    def _refuse_foreign(self) -> None:
        """Refuse foreign files: only a preparation's own are ever removed."""
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise OutputError(f"{self.path} is in the way: it is no folder; remove it, or choose another --out")
        # Unlike Path.rglob, os.walk tolerates a folder that vanishes when another process publishes its result.
        for folder, subfolders, files in os.walk(self.path):
            for name in sorted([*subfolders, *files]):
                file = Path(folder, name)
                relative = file.relative_to(self.path).as_posix()
                # A link leads to foreign files.
                if file.is_symlink() or not _OWN_NAMES.fullmatch(relative):
                    raise OutputError(
                        f"{self.path} is in the way: it holds {relative}, which no preparation wrote; "
                        "move it, or choose another --out"
                    )

    def _take(self) -> bool:
        """Create and lock the folder; False if another process removed it meanwhile."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = os.open(self.path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._lock, 300, 0).decode(errors="replace").strip() or "another process"
            self._release()
            raise OutputError(
                f"--out {self._target} is being prepared by {owner}; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                self._release()
                raise
        try:
            same = os.path.samestat(os.fstat(self._lock), os.stat(self.path / _LOCK_NAME))
        except FileNotFoundError:
            same = False
        if not same:
            self._release()
            return False
        # Used only in a message; the disk may be full.
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        return True

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _remove_parents(self) -> None:
        for parent in self._missing_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()


def remove_emptied(target: Path) -> None:
    """Remove the leftovers of a preparation that was killed right after publishing."""
    work = WorkFolder(target)
    if work.path.is_dir() and not work.result.exists():
        with contextlib.suppress(OutputError, OSError), work:
            work.remove()
