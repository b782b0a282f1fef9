"""Allows one run at a time to write to a directory, by a lease with a heartbeat. A dead holder's lease is taken over.

The lease is one small file that names its holder. On the holder's own host, its process shows whether it is alive.
On other hosts the file does: a live holder changes it every few seconds, and a lease unchanged for `STALE_S` counts as
abandoned. Clocks of two hosts are never compared. Workers restarted by the same launch take over at once.
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
from trainer.config.draft import ConfigError

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
"""Time between two heartbeats."""
STALE_S = 60.0
"""A lease unchanged for this long counts as abandoned if its holder's process cannot be checked from this host."""
LAUNCH_VARIABLE = "DDGAN_LAUNCH"
"""Environment variable with the ID of the launch that a worker belongs to."""
_POLL_S = 0.5
_RECORD_BYTES = 1024


class LeaseError(ConfigError):
    """Another run writes to the directory; says which one, and what to do."""


class LeasePlace(Protocol):
    """Where a lease is kept. Its methods raise OSError if the place cannot be read or written."""

    shown: str
    """The guarded directory, for messages."""

    def read(self) -> bytes | None:
        """The lease; None if there is none."""
        ...

    def swap(self, seen: bytes | None, content: bytes) -> bool:
        """Write the lease if it still equals `seen`; returns whether it was written."""
        ...

    def beat(self, seen: bytes, content: bytes) -> bool:
        """Like `swap`, but only for the holder; needs no free disk space."""
        ...

    def remove(self, seen: bytes) -> None:
        """Remove the lease if it still equals `seen`."""
        ...


@dataclass(frozen=True)
class Holder:
    """The holder of a lease.

    Attributes:
        launch: ID of its launch; see `launch_id`.
        process: as from `this_process`.
        token: unique to this acquisition.
        host, pid, since: for messages; `since` in UTC.
        beat: number of heartbeats.
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
        """A holder for this process."""
        return cls(launch, this_process(), uuid.uuid4().hex, platform.node(), os.getpid(), timestamp())

    def encode(self) -> bytes:
        """The file's content. Its length is constant, so it can be overwritten in place."""
        return json.dumps(asdict(self)).encode().ljust(_RECORD_BYTES - 1) + b"\n"

    @classmethod
    def decode(cls, content: bytes) -> "Holder | None":
        """Parse the file's content; None if it is damaged."""
        try:
            holder = cls(**json.loads(content))
        except (ValueError, TypeError, RecursionError):
            return None
        texts = (holder.launch, holder.process, holder.token, holder.host, holder.since)
        numbers = (holder.pid, holder.beat)
        are_texts = all(isinstance(text, str) and text.isprintable() for text in texts)
        return holder if are_texts and all(type(number) is int for number in numbers) else None


def this_process() -> str:
    """A process ID that is unique across hosts: boot, process namespace, number and start time."""
    return f"{_machine()} {os.getpid()} {_started(os.getpid())}"


def launch_id() -> str:
    """The launch that this process belongs to: its driver's, else torchrun's, else its own."""
    torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" is shared by all runs without --rdzv-id
    return os.environ.get(LAUNCH_VARIABLE) or (f"torchrun {torchrun}" if torchrun != "none" else this_process())


def is_alive(process: str) -> bool | None:
    """Whether a process as from `this_process` is alive; None if that cannot be checked from here."""
    machine, _, rest = process.partition(" ")
    pid, _, started = rest.partition(" ")
    if machine != _machine() or not (pid.isascii() and pid.isdigit() and len(pid) < 20) or not _started(os.getpid()):
        return None
    return _started(int(pid)) == started != ""


class Lease:
    """A lease that this process holds until `release`. A thread keeps it alive."""

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
        """Check that this process still holds the lease.

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
        """Release the lease; further calls do nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if not self._lost:
            with suppress(OSError):  # the lease then goes stale
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
                except OSError as error:  # a disk error; the next heartbeat may succeed
                    log.warning("lease on %s: no heartbeat: %s", self._place.shown, error)
            if self._lost:
                return

    def _notice_loss(self) -> None:
        content = self._place.read()
        holder = Holder.decode(content) if content else None
        if holder and holder.token == self._holder.token:
            self._content, self._holder = content or b"", holder  # a heartbeat that had seemed to fail did arrive
            return
        # A run that took the lease over from a stalled holder may have ended since, and removed it.
        by = f"another run took it over ({_describe(holder)})" if content else "it was removed, perhaps by another run"
        self._lost = f"{self._place.shown}: lost the lease on it: {by}; this run writes no more"
        log.error("%s", self._lost)


def acquire(place: LeasePlace, launch: str, *, clock: Callable[[], float] = time.monotonic) -> Lease:
    """Take the lease, waiting up to `STALE_S` to see whether a holder on another host is alive.

    Args:
        place: where it is kept.
        launch: launch of this process; a holder of the same launch is replaced at once.
        clock: monotonic seconds.

    Raises:
        LeaseError: another run holds it.
        OSError: the place cannot be read or written.
    """
    mine = Holder.here(launch)
    while not place.swap(_await_turn(place, mine, clock), mine.encode()):
        pass
    return Lease(place, mine)


def _await_turn(place: LeasePlace, mine: Holder, clock: Callable[[], float]) -> bytes | None:
    """Wait until the lease may be taken; returns its content."""
    seen = place.read()
    began = unchanged_since = clock()
    told = False
    while True:
        content = place.read()
        holder = Holder.decode(content) if content else None
        if content is None or (holder and _may_be_replaced(holder, mine)):
            return content
        now = clock()
        if content != seen:
            seen, unchanged_since = content, now
        alive = is_alive(holder.process) if holder else None
        # The holder's driver was killed; the holder will end soon.
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


def _may_be_replaced(holder: Holder, mine: Holder) -> bool:
    """Whether the holder is certainly dead, of our own launch, or this same process at an earlier time."""
    return holder.launch == mine.launch or holder.process == mine.process or is_alive(holder.process) is False


def _describe(holder: Holder | None) -> str:
    return f"process {holder.pid} on {holder.host}, since {holder.since}" if holder else "a lease that cannot be read"


def _machine() -> str:
    """This boot of this host, and the namespace in which its process IDs are valid."""
    boot, namespace = platform.node(), ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{boot}{namespace}".replace(" ", "")


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot; empty if it does not exist, is a zombie, or without /proc.

    Not psutil's create_time, which adds the time of the boot: that moves when the clock is set, and processes that
    look at different times would disagree.
    """
    try:
        # The name, in parentheses, may contain any characters.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
