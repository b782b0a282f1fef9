"""A writable remote folder: files appear atomically, and a conditional write needs the latest version."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from data.storage.failures import FailureError, explain
from data.storage.redaction import redact
from data.storage.remote import Storage

_CHUNK_BYTES = 2**23
_T = TypeVar("_T")


class StorageError(OSError):
    """The storage could not be listed, read or written; says what and why, with secrets redacted."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class WritableStorage(Storage):
    """One remote folder. Each call is tried once: the caller decides whether to retry, with `retried`."""

    @property
    def has_versions(self) -> bool:
        """Whether `version` and `put_if` work: with S3 and compatible services."""
        return self._protocol in ("s3", "s3a")

    def files(self) -> dict[str, int]:
        """Sizes in bytes of all files below the folder, by name; empty if it is missing.

        Raises:
            StorageError: the storage does not answer, or refuses.
        """
        with self._explained("cannot list it"):
            found: dict[str, dict[str, Any]] = self._call("find", "", detail=True)
            root = self._connect()[1].strip("/")
        return {name.strip("/").removeprefix(root + "/"): entry["size"] for name, entry in found.items()}

    def read_if_there(self, name: str) -> bytes | None:
        """The content of a small file; None if it is missing.

        Raises:
            StorageError: the storage does not answer, or refuses.
        """
        try:
            with self._explained(f"cannot read {name}"):
                return self._call("cat_file", name)
        except FileNotFoundError:
            return None

    def write(self, name: str, chunks: Iterable[memoryview]) -> None:
        """Write a file. It replaces an existing one when all of it has arrived.

        Raises:
            StorageError: it did not arrive; an existing file is unchanged.
        """
        with self._explained(f"cannot write {name}"):
            with self._connecting:
                filesystem, root = self._connect()
            file: Any = filesystem.open(f"{root}/{name}", "wb")
            try:
                for chunk in chunks:
                    file.write(chunk)
            except BaseException:
                file.discard()
                file.closed = True  # otherwise its destructor would store the partial content
                raise
            file.close()

    def chunks(self, name: str) -> Iterator[bytes]:
        """The content of a file, piece by piece.

        Raises:
            StorageError: it cannot be read.
            FileNotFoundError: it is missing.
        """
        with self._explained(f"cannot read {name}"):
            with self._connecting:
                filesystem, root = self._connect()
            file: Any = filesystem.open(f"{root}/{name}", "rb", cache_type="none")
            with file:
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk

    def retried(self, name: str, action: Callable[[], _T], stop: threading.Event | None = None) -> _T:
        """Try again what fails for a while only; the other methods try once.

        Args:
            name: of the file, for the log.
            action: calls other methods.
            stop: ends the pauses and attempts when set.

        Raises:
            StorageError: it failed in the end.
            AbandonedError: `stop` was set.
        """

        def attempt() -> _T:
            try:
                return action()
            except StorageError as error:
                raise error.__cause__ or error from error

        try:
            return self._retry(name, attempt, stop)
        except FailureError as failure:
            raise StorageError(f"{self.url}/{name}: {failure}") from failure

    def put(self, name: str, content: bytes) -> None:
        """Write a small file in one request.

        Raises:
            StorageError: it did not arrive.
        """
        with self._explained(f"cannot write {name}"):
            self._call("pipe_file", name, content)

    def version(self, name: str) -> str | None:
        """A token that identifies the current content of a file (S3's ETag); None if the file is missing.

        Raises:
            StorageError: the storage does not answer, or refuses.
        """
        try:
            with self._explained(f"cannot ask for {name}"):
                return self._call("info", name)["ETag"]
        except FileNotFoundError:
            return None

    def put_if(self, name: str, content: bytes, *, version: str | None) -> bool:
        """Write a small file only if it still has `version` (None: only if missing). Return whether it was written.

        Raises:
            StorageError: the storage does not answer, or cannot do this.
        """
        condition: dict[str, Any] = {"mode": "create"} if version is None else {"IfMatch": version}
        try:
            with self._explained(f"cannot write {name}"):
                self._call("pipe_file", name, content, **condition)
        except FileExistsError:
            return False
        except FileNotFoundError:
            return False  # removed after its version was read
        except StorageError as error:
            if isinstance(error.__cause__, FailureError) and "HTTP 412" in error.__cause__.reason:
                return False
            raise
        return True

    def remove(self, names: Iterable[str]) -> None:
        """Remove files in the given order; missing ones are skipped.

        Raises:
            StorageError: the storage does not answer, or refuses.
        """
        for name in names:
            try:
                with self._explained(f"cannot remove {name}"):
                    self._call("rm_file", name)
            except FileNotFoundError:
                continue

    def copy(self, name: str, target: str) -> None:
        """Copy a file within the folder, without a download where the service can.

        Raises:
            StorageError: the storage does not answer, or refuses.
        """
        with self._explained(f"cannot copy {name} to {target}"):
            root = self._connect()[1]
            self._call("cp_file", name, f"{root}/{target}")

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Translate errors, except those for files that are missing or already exist."""
        try:
            yield
        except StorageError:
            raise
        except FailureError as failure:
            raise StorageError(f"{self.url}: {what}: {failure}") from failure
        except FileExistsError:
            raise
        except Exception as error:
            failure = explain(error, self._protocol)
            if failure is None:
                raise
            if failure.missing and "bucket" not in failure.reason:
                raise FileNotFoundError(f"{redact(self.url)}: {what}: there is no such file") from None
            if failure.missing:
                failure.advice = "make the bucket, or check the URL"
            raise StorageError(f"{self.url}: {what}: {failure}") from failure
