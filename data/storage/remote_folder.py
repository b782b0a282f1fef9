"""A remote folder that others have filled: listed, read, and copied with the means to continue after a stop."""

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from data.storage.failures import FailureError
from data.storage.location import DataError
from data.storage.remote import Storage, _Progress

_RANGE_BYTES = 16 * 2**20
"""Read at a time where a filesystem cannot stream from the middle of a file."""
_VERSION_FIELDS = ("ETag", "etag", "Content-MD5", "generation", "Last-Modified", "LastModified", "updated", "mtime")
"""What filesystems tell of a file that changes with its content, the most reliable first."""


class RemoteFile(NamedTuple):
    """What a storage says about a file."""

    num_bytes: int | None
    """None if it does not say."""
    version: str
    """Changes with the content; empty if it does not say."""


class RemoteFolder(Storage):
    """One remote folder, read only."""

    @property
    def can_list(self) -> bool:
        """Whether the storage knows its files: a web server does not."""
        return self._protocol not in ("http", "https")

    def ask(self, name: str) -> RemoteFile:
        """Size and version of a file.

        Raises:
            DataError: it is missing, or the server does not answer, or refuses.
        """
        try:
            return _remote_file(self._retry(name, lambda: self._call("info", name), None))
        except FailureError as failure:
            self._fail(name, failure)

    def listing(self) -> dict[str, RemoteFile]:
        """All files below the folder by their names, sorted; empty if there is no such folder.

        Raises:
            DataError: the storage does not answer, or refuses.
        """
        try:
            found: dict[str, dict[str, Any]] = self._retry("", lambda: self._call("find", "", detail=True), None)
        except FailureError as failure:
            raise DataError(f"cannot list {self.url}: {failure}") from None
        root = self._connect()[1].strip("/")
        names = {name.strip("/").removeprefix(root + "/"): entry for name, entry in found.items()}
        return {name: _remote_file(names[name]) for name in sorted(names)}

    def content(self, name: str) -> bytes | None:
        """The whole content of a file; None if it is missing.

        Raises:
            DataError: the server does not answer, or refuses.
        """
        try:
            return self._retry(name, lambda: self._call("cat_file", name), None)
        except FailureError as failure:
            if failure.missing:
                return None
            self._fail(name, failure)

    def resume(self, name: str, target: Path, *, num_bytes: int, report: Callable[[int], None]) -> None:
        """Copy a file to a local file, from where an earlier call stopped; what has arrived stays if this fails.

        Args:
            name: file in this folder.
            target: local file; what it holds already must be the start of this version of the remote file.
            num_bytes: size of the remote file.
            report: is told the size of the local file as it grows.

        Raises:
            DataError: it cannot be read.
            OSError: the local file cannot be written, e.g. ENOSPC.
        """

        def transfer() -> None:
            with target.open("ab") as stream:
                if stream.tell() > num_bytes:
                    stream.truncate(0)
                    stream.seek(0)
                append = self._append_ranges if self.can_list else self._append_stream
                append(name, stream, num_bytes, report)
            if (found := target.stat().st_size) != num_bytes:
                raise FailureError(f"it ended after {found} of {num_bytes} bytes", passing=True)

        try:
            self._retry(name, transfer, None)
        except FailureError as failure:
            self._fail(name, failure)

    def _append_stream(self, name: str, stream: IO[bytes], num_bytes: int, report: Callable[[int], None]) -> None:
        if (held := stream.tell()) == num_bytes:
            return
        progress = _Rest(held, num_bytes, report)
        headers = {"Range": f"bytes={held}-"} if held else {}
        try:
            self._call("get_file", name, stream, callback=progress, progress=progress, headers=headers)
        except FailureError:
            if progress.is_whole:
                stream.truncate(0)
            raise

    def _append_ranges(self, name: str, stream: IO[bytes], num_bytes: int, report: Callable[[int], None]) -> None:
        while (held := stream.tell()) < num_bytes:
            content = self._call("cat_file", name, start=held, end=min(held + _RANGE_BYTES, num_bytes))
            if not content:
                return
            stream.write(content)
            report(stream.tell())


class _Rest(_Progress):
    """Progress of a transfer that begins in the middle of a file."""

    def __init__(self, held: int, num_bytes: int, report: Callable[[int], None]) -> None:
        super().__init__(num_bytes - held, None)
        self._num_bytes_left = num_bytes - held
        self._held = held
        self._report = report
        self._arrived = held
        self.is_whole = False
        """The server sends the file from its start instead."""

    def set_size(self, size: int | None) -> None:
        super().set_size(size)  # pyright: ignore[reportArgumentType]
        if self._held and size == self._held + self._num_bytes_left:
            self.is_whole = True
            raise FailureError("the server cannot continue in the middle; it is read from its start", passing=True)

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._arrived += inc
        self._report(self._arrived)


def _remote_file(info: dict[str, Any]) -> RemoteFile:
    return RemoteFile(info.get("size"), next((str(info[field]) for field in _VERSION_FIELDS if info.get(field)), ""))
