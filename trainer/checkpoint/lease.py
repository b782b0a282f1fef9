"""One run at a time writes to a directory: its lease, kept alive by a heartbeat, taken over when its holder is dead.

The lease is one small file that names its holder. Whether that one lives is seen, on the same host, from its process;
from elsewhere, from the file: a holder changes it every few seconds, and if it stays as it is for `STALE_S`, nobody is
there. Clocks of two hosts are never compared. Workers that are started again by the same launch take over at once.
"""

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from data.storage.files import timestamp
from trainer.config.io import ConfigError

log = logging.getLogger(__name__)


HEARTBEAT_S = 5.0
"""Pause between two heartbeats."""


STALE_S = 60.0
"""How long a lease must stay unchanged to count as given up by a holder whose process cannot be looked at."""


LAUNCH_VARIABLE = "DDGAN_LAUNCH"
"""Environment variable that names the launch a worker belongs to."""


_POLL_S = 0.5


_RECORD_BYTES = 1024


class LeaseError(ConfigError):
    """Another run writes to the directory; says which, and what to do."""


class LeasePlace(Protocol):
    """Where a lease is kept. Its methods raise OSError when the place cannot be read or written."""

    shown: str
    """The directory that it guards, for messages."""

    def read(self) -> bytes | None:
        """The lease; None without one."""
        ...

    def swap(self, seen: bytes | None, content: bytes) -> bool:
        """Write the lease if it still is as `seen`; whether it was written."""
        ...

    def beat(self, seen: bytes, content: bytes) -> bool:
        """As `swap`, for the holder alone; needs no room on the disk."""
        ...

    def remove(self, seen: bytes) -> None:
        """Remove the lease if it still is as `seen`."""
        ...


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        launch: start of the command that it belongs to; see `launch_id`.
        process: as from `this_process`.
        token: of this one acquisition.
        host, pid, since: for messages; `since` in UTC.
        beat: counts the heartbeats.
    """

    launch: str
    process: str
    token: str
    host: str
    pid: int
    since: str
    beat: int = 0

    @classmethod
    def here(cls, launch: str) -> "Holder":
        """This process."""
        return cls(launch, this_process(), uuid.uuid4().hex, platform.node(), os.getpid(), timestamp())

    def encode(self) -> bytes:
        """The file, always of the same length, so that it can be written over in place."""
        return json.dumps(asdict(self)).encode().ljust(_RECORD_BYTES - 1) + b"\n"

    @classmethod
    def decode(cls, content: bytes) -> "Holder | None":
        """From the file; None if it is damaged."""
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return None


def this_process() -> str:
    """What no other process has, on any host: boot, process namespace, number and start time."""
    return f"{_machine()} {os.getpid()} {_started(os.getpid())}"


def launch_id() -> str:
    """The launch that this process belongs to: what its driver handed down, torchrun's, or else its own."""
    torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" is the same for all that give no --rdzv-id
    return os.environ.get(LAUNCH_VARIABLE) or (f"torchrun {torchrun}" if torchrun != "none" else this_process())


def is_alive(process: str) -> bool | None:
    """Whether a process as from `this_process` lives; None if it cannot be seen from here."""
    machine, _, rest = process.partition(" ")
    pid, _, started = rest.partition(" ")
    if machine != _machine() or not pid.isdigit() or not _started(os.getpid()):
        return None
    return _started(int(pid)) == started != ""


class Lease:
    """A lease that this process holds, until `release`. A thread keeps it alive."""

    def __init__(self, place: LeasePlace, holder: Holder) -> None:
        self._place = place
        self._holder = holder
        self._content = holder.encode()
        self._lock = threading.Lock()
        self._lost = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """See that the lease is still ours.

        Raises:
            LeaseError: another run has taken it over.
            OSError: the place cannot be read.
        """
        with self._lock:
            if self._ended.is_set():
                raise LeaseError([f"{self._place.shown}: the lease has been given back"])
            if not self._lost and self._place.read() != self._content:
                self._notice_loss()
            if self._lost:
                raise LeaseError([self._lost])

    def release(self) -> None:
        """Give it back; again does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if not self._lost:
            with suppress(OSError):  # it goes stale then
                self._place.remove(self._content)

    def _keep_alive(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with self._lock:
                content = replace(self._holder, beat=self._holder.beat + 1).encode()
                try:
                    if self._place.beat(self._content, content):
                        self._content, self._holder = content, replace(self._holder, beat=self._holder.beat + 1)
                    else:
                        self._notice_loss()
                except OSError as error:  # of the disk; the next beat may be better
                    log.warning("lease on %s: no heartbeat: %s", self._place.shown, error)
            if self._lost:
                return

    def _notice_loss(self) -> None:
        content = self._place.read()
        holder = Holder.decode(content) if content else None
        if holder and holder.token == self._holder.token:
            self._content, self._holder = content or b"", holder  # a heartbeat arrived that had been given up
            return
        # Whoever took it over from a holder that stood still may have ended since, and removed it.
        by = f"another run took it over ({_describe(holder)})" if content else "it was removed, perhaps by another run"
        self._lost = f"{self._place.shown}: lost the lease on it: {by}; this run writes no more"
        log.error("%s", self._lost)


def acquire(place: LeasePlace, launch: str, *, clock: Callable[[], float] = time.monotonic) -> Lease:
    """Take the lease, waiting up to `STALE_S` to see whether a holder elsewhere lives.

    Args:
        place: where it is kept.
        launch: of this process; a holder of the same launch gives way at once.
        clock: seconds that only grow.

    Raises:
        LeaseError: another run holds it.
        OSError: the place cannot be read or written.
    """
    mine = Holder.here(launch)
    while not place.swap(_await_turn(place, mine, clock), mine.encode()):
        pass
    return Lease(place, mine)


def _await_turn(place: LeasePlace, mine: Holder, clock: Callable[[], float]) -> bytes | None:
    """What the place holds once it may be taken."""
    seen = place.read()
    began = unchanged_since = clock()
    told = False
    while True:
        content = place.read()
        holder = Holder.decode(content) if content else None
        if content is None or (holder and _gives_way(holder, mine)):
            return content
        now = clock()
        if content != seen:
            seen, unchanged_since = content, now
        alive = is_alive(holder.process) if holder else None
        # Its driver was killed on this host: it is about to end.
        orphaned = holder is not None and is_alive(holder.launch) is False
        beats = alive or unchanged_since > began
        if beats and (not orphaned or now - began > STALE_S):
            raise LeaseError(
                [
                    f"{place.shown} is in use by another run: {_describe(holder)}. Two runs would spoil each other's "
                    "checkpoints: stop that one first, or give this one another run.directory"
                ]
            )
        if alive is None and now - unchanged_since > STALE_S:
            return content
        if not told:
            log.info("%s: waiting up to %.0f s to see whether %s is alive", place.shown, STALE_S, _describe(holder))
            told = True
        time.sleep(_POLL_S)


def _gives_way(holder: Holder, mine: Holder) -> bool:
    """Whether a holder is dead for sure, or of our own launch, or this very process at an earlier time."""
    return holder.launch == mine.launch or holder.process == mine.process or is_alive(holder.process) is False


def _describe(holder: Holder | None) -> str:
    return f"process {holder.pid} on {holder.host}, since {holder.since}" if holder else "a lease that cannot be read"


def _machine() -> str:
    """This boot of this host, and the namespace in which its process numbers mean something."""
    boot, namespace = platform.node(), ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{boot}{namespace}".replace(" ", "")


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot; empty if there is none, or only its remains, or no /proc."""
    try:
        # The name, in brackets, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
