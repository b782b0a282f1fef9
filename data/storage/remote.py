"""Reads files of a prepared data set from http(s), s3 or another fsspec filesystem, with retries."""

import asyncio
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import fsspec
import tenacity
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.callbacks import Callback

from data.storage.failures import FailureError, explain
from data.storage.location import DataError, checked_url
from data.storage.redaction import redact

log = logging.getLogger(__name__)

ATTEMPTS = 6
"""Attempts for temporary failures, with doubling pauses: about a minute in total if each fails at once."""
FIRST_WAIT_S = 2.0
"""Pause after the first failure. Up to a second of random jitter keeps hosts from retrying together."""
LONGEST_WAIT_S = 20.0
"""Longest pause."""
CONNECT_S = 10.0
"""Connection timeout."""
STALL_S = 30.0
"""A transfer without a byte for this long has stalled."""
_POLL_S = 0.1
_PARALLEL_REQUESTS = 16
_T = TypeVar("_T")
Advance = Callable[[int], None]
"""Told of bytes as they are copied, for a progress bar."""


class AbandonedError(Exception):
    """The caller cancelled its request."""


class Storage:
    """One remote folder. Each process connects on first use, so a forked process may use this object."""

    def __init__(self, url: str, *, attempts: int | None = None) -> None:
        """Check the URL without a connection.

        Args:
            url: of the folder.
            attempts: how often to try in temporary failures; None: 6 times, ATTEMPTS.

        Raises:
            DataError: it is invalid, or its storage is unknown.
        """
        self.url = checked_url(url)
        """The folder, without a trailing slash. It may hold a password: show it through `redact` only."""
        self._protocol = self.url.partition("://")[0]
        self._attempts = ATTEMPTS if attempts is None else attempts
        self._connecting = threading.Lock()
        self._connected: tuple[int, fsspec.AbstractFileSystem, str] | None = None

    def read(self, name: str) -> bytes:
        """The content of a small file.

        Raises:
            DataError: it is missing or cannot be read.
        """
        with tempfile.TemporaryDirectory(prefix="ddgan-") as folder:
            target = Path(folder) / "content"
            try:
                self.download(name, target)
                return target.read_bytes()
            except OSError as error:
                raise DataError(f"{name}: cannot store it in {folder}: {error.strerror or error}") from None

    def sizes(self, names: Sequence[str]) -> dict[str, int | None]:
        """Sizes of files in bytes, requested in parallel.

        Returns:
            The size by name; None if the server does not report it. Missing files are left out.

        Raises:
            DataError: the server does not answer, or refuses.
        """
        found: dict[str, int | None] = {}
        stop = threading.Event()
        with ThreadPoolExecutor(_PARALLEL_REQUESTS, thread_name_prefix="sizes") as executor:
            asked = {executor.submit(self._size, name, stop): name for name in names}
            try:
                for future in as_completed(asked):
                    try:
                        found[asked[future]] = future.result()
                    except FailureError as failure:
                        if not failure.missing:
                            self._fail(asked[future], failure)
            finally:
                # One failed request is enough: the others would only take time to fail the same way.
                stop.set()
                executor.shutdown(wait=False, cancel_futures=True)
        return found

    def download(
        self,
        name: str,
        target: Path,
        *,
        num_bytes: int | None = None,
        stop: threading.Event | None = None,
        advance: Advance | None = None,
    ) -> None:
        """Copy a file to a local file, which may be incomplete if this fails.

        Args:
            name: file in this folder.
            target: local file, overwritten.
            num_bytes: expected size; the transfer of a longer file is aborted.
            stop: ends the transfer when set.
            advance: told of every byte that arrives, and of those that were in vain, as a negative number.

        Raises:
            DataError: it cannot be read, or has another size.
            AbandonedError: `stop` was set.
            OSError: the local file cannot be written, e.g. ENOSPC.
        """

        def transfer() -> None:
            progress = _Progress(num_bytes, stop, advance)
            try:
                self._call("get_file", name, str(target), callback=progress, progress=progress)
                found = target.stat().st_size
                if num_bytes is not None and found != num_bytes:
                    if found == progress.size:
                        raise WrongSizeError(found, num_bytes)
                    raise FailureError(f"it ended after {found} of {num_bytes} bytes", passing=True)
            except BaseException:
                progress.take_back()
                raise

        try:
            self._retry(name, transfer, stop)
        except FailureError as failure:
            self._fail(name, failure)

    def _size(self, name: str, stop: threading.Event) -> int | None:
        return self._retry(name, lambda: self._call("info", name, progress=_Progress(None, stop))["size"], stop)

    def _fail(self, name: str, failure: FailureError) -> NoReturn:
        raise DataError(f"{_label(name)}: cannot read {self.url}/{name}: {failure}") from None

    def _retry(self, name: str, action: Callable[[], _T], stop: threading.Event | None) -> _T:
        """Retry until it succeeds, fails permanently, or has failed too often."""
        stop = stop or threading.Event()
        began = time.monotonic()

        def attempt() -> _T:
            if stop.is_set():
                raise AbandonedError
            try:
                return action()
            except (FailureError, AbandonedError, DataError):
                raise
            except Exception as error:
                failure = explain(error, self._protocol)
                if failure is None:
                    raise
                raise failure from error

        def report(state: tenacity.RetryCallState) -> None:
            assert state.outcome is not None
            log.warning(
                "%s: %s (attempt %d of %d, next in %.1f s)",
                _label(name),
                redact(str(state.outcome.exception())),
                state.attempt_number,
                self._attempts,
                state.upcoming_sleep,
            )

        def pause(seconds: float) -> None:
            stop.wait(seconds)

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=tenacity.wait_exponential(FIRST_WAIT_S, max=LONGEST_WAIT_S)
            + tenacity.wait_random(0, min(1.0, FIRST_WAIT_S)),
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, FailureError) and error.passing),
            sleep=pause,
            before_sleep=report,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except FailureError as failure:
            if failure.passing and self._attempts > 1:
                failure.reason += f" ({self._attempts} attempts in {time.monotonic() - began:.0f} s)"
            raise

    def _call(self, method: str, name: str, *args: Any, progress: "_Progress | None" = None, **kwargs: Any) -> Any:
        """Call a filesystem's method. Stalled calls are cancelled; synchronous filesystems have their own timeouts."""
        with self._connecting:
            filesystem, root = self._connect()
        path = f"{root}/{name}"
        if isinstance(filesystem, AsyncFileSystem):
            coroutine = getattr(filesystem, f"_{method}")(path, *args, **kwargs)
            return sync(filesystem.loop, _supervise, coroutine, progress or _Progress(None, None))
        return getattr(filesystem, method)(path, *args, **kwargs)

    def _connect(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """The filesystem of this process. Its loop and sockets would be useless or harmful in a forked child."""
        if self._connected is None or self._connected[0] != os.getpid():
            try:
                filesystem, root = fsspec.url_to_fs(self.url, skip_instance_cache=True, **self._options())
            except ImportError as error:
                raise DataError(f"{self.url}: a package is missing to read it: {error}") from None
            if self._protocol in ("s3", "s3a"):
                filesystem.retries = 1  # ours are logged
            if isinstance(filesystem, AsyncFileSystem) and (set_session := getattr(filesystem, "set_session", None)):
                # Otherwise each thread would do this on its first request.
                sync(filesystem.loop, set_session)
            self._connected = (os.getpid(), filesystem, root.rstrip("/"))
        return self._connected[1:]

    def _options(self) -> dict[str, Any]:
        if self._protocol in ("http", "https"):
            # Imported here: local data does not need it.
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
            # Compression would change a shard's size. Proxies and ~/.netrc come from the environment.
            headers = {"Accept-Encoding": "identity"}
            return {"client_kwargs": {"timeout": timeout, "headers": headers, "trust_env": True}}
        if self._protocol in ("s3", "s3a"):
            config = {"connect_timeout": CONNECT_S, "read_timeout": STALL_S, "retries": {"max_attempts": 0}}
            # Parallel parts would fill memory: ten of 50 MB.
            return {"config_kwargs": config, "use_listings_cache": False, "max_concurrency": 1}
        return {}


class WrongSizeError(FailureError):
    """The file on the server does not match the index."""

    def __init__(self, found: int | None, stated: int) -> None:
        size = f"{found} bytes" if found is not None else "more"
        super().__init__(f"it has {size}, the index says {stated}", advice="upload it again")


class _Progress(Callback):
    """Counts the bytes of a transfer, and ends it when it should not continue."""

    def __init__(self, num_bytes: int | None, stop: threading.Event | None, advance: Advance | None = None) -> None:
        super().__init__()
        self._num_bytes = num_bytes
        self._stop = stop
        self._advance = advance
        self._received = self._told = 0
        self._last = time.monotonic()

    def relative_update(self, inc: int = 1) -> None:
        self._received += inc
        self._last = time.monotonic()
        if self._num_bytes is not None and self._received > self._num_bytes:
            raise WrongSizeError(None, self._num_bytes)
        if self._stop is not None and self._stop.is_set():
            raise AbandonedError
        if self._advance is not None:
            self._advance(inc)
            self._told += inc

    def take_back(self) -> None:
        """The bytes so far were in vain."""
        if self._advance is not None:
            self._advance(-self._told)

    def reason_to_end(self) -> Exception | None:
        """None if it may continue."""
        if self._stop is not None and self._stop.is_set():
            return AbandonedError()
        if time.monotonic() - self._last > STALL_S:
            return FailureError(f"it stalled: no byte for {STALL_S:g} s", passing=True)
        return None


async def _supervise(transfer: Coroutine[Any, Any, Any], progress: _Progress) -> Any:
    """Await a transfer. If it stalls or is no longer wanted, cancel it and wait for its end."""
    task = asyncio.ensure_future(transfer)
    while not task.done():
        await asyncio.wait({task}, timeout=_POLL_S)
        reason = progress.reason_to_end()
        if reason is not None and not task.done():
            task.cancel()
            await asyncio.wait({task})
            raise reason
    try:
        return task.result()
    except asyncio.CancelledError:
        raise ConnectionError("the transfer was cancelled") from None


def _label(name: str) -> str:
    kinds = {".tar": "shard ", ".offsets": "offsets "}
    return kinds.get(Path(name).suffix, "") + name
