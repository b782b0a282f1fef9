"""Where compiled code is kept between runs, and in which order the ranks of a host compile.

torch's compiler keeps its results in a folder: a later process that compiles the same code for the same shapes loads
them. The folder is named after what the results depend on: the versions of torch and triton, and the GPU.
"""

import fcntl
import hashlib
import importlib.metadata
import logging
import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from data.storage.paths import user_cache

log = logging.getLogger(__name__)


class CompileCache:
    """The folder of compiled code. It is given to torch's compiler by its environment variable.

    Whoever can write to the folder can run code as this user, so a folder of somebody else is not used.

    Args:
        place: folder that holds one folder for each combination of versions and GPU; None: `compiled` in the user's
            cache folder.
        device: the device that the code is for.
    """

    def __init__(self, place: str | None, device: torch.device) -> None:
        self.folder: Path | None = None
        self._first: str | None = None
        self._kinds = self._graphs = self._loaded = 0
        self._seconds = 0.0
        try:
            folder = (Path(place) if place else user_folder()) / cache_key(device)
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (found := folder.stat()).st_uid != os.geteuid() or found.st_mode & 0o022:
                raise PermissionError(f"others than this user can write to {folder}")
            (folder / "turns").mkdir(mode=0o700, exist_ok=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home folder
            log.warning("engine.compile_cache cannot be used, so each start compiles again: %s", error)
            return
        self.folder = folder
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)

    @contextmanager
    def turn(self, name: str, kinds: int) -> Iterator[None]:
        """Inside, this process compiles `name`, which has `kinds` kinds of blocks.

        The first process compiles. Those that come meanwhile wait, and then load the result, all at the same time. The
        wait ends also if the first one is killed, because its lock goes with it.
        """
        lock = self._lock(name)
        started, before = time.perf_counter(), _counts()
        try:
            yield
        finally:
            if lock is not None:
                os.close(lock)
            graphs, loaded = (now - then for now, then in zip(_counts(), before, strict=True))
            self._first = self._first or name
            self._kinds += kinds * (graphs > 0)
            self._graphs += graphs
            self._loaded += loaded
            self._seconds += time.perf_counter() - started

    def _lock(self, name: str) -> int | None:
        if self.folder is None:
            return None
        path = self.folder / "turns" / hashlib.sha256(name.encode()).hexdigest()[:32]
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return None  # a full disk, for example: the ranks then compile at the same time
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(lock, fcntl.LOCK_SH)
        except OSError:  # a file system without locks
            os.close(lock)
            return None
        return lock

    def report(self, name: str) -> None:
        """Log what was compiled, once a step is complete: `name` runs again, and it was the first to be compiled."""
        if not self._graphs or name != self._first:
            return
        log.info(
            "compiled %d kinds of blocks (%d graphs, %d from %s) in %.0f s",
            self._kinds,
            self._graphs,
            self._loaded,
            self.folder or "no cache",
            self._seconds,
        )
        self._kinds = self._graphs = self._loaded = 0
        self._seconds = 0.0


def user_folder() -> Path:
    """The default folder, see `user_cache`."""
    return user_cache("compiled")


def cache_key(device: torch.device) -> str:
    """What compiled code depends on, as the name of a folder: versions of torch and triton, and the device's name."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}-{platform.machine()}"
    return re.sub(r"[^\w.+-]+", "-", f"torch-{torch.__version__}-triton-{triton}-{name}")


def _counts() -> tuple[int, int]:
    """Graphs compiled by this process so far, and how many of them were found in the cache."""
    from torch._dynamo.utils import counters  # takes a second to import, so not where nothing is compiled

    return counters["stats"]["unique_graphs"], counters["aot_autograd"]["autograd_cache_hit"]
