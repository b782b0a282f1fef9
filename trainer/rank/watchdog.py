"""Nothing hangs: a rank that stands still says where it stands, and ends itself so that its group is restarted.

A thread of each rank looks at the time since the rank last went on to another phase of its work. When that is too long,
it writes the stacks of all threads to stderr and to RUN/watchdog-rank-N.txt and ends the process with `EXIT_CODE`. A
thread that waits in a collective lets others run, so that this works for the usual hang: another rank is gone or stuck.
Where the main thread keeps the interpreter to itself, faulthandler's own clock, which needs no interpreter, writes the
stacks to stderr and ends the process, with code 1.

A process that is stopped (SIGSTOP, a paused machine) stands still too, and so do all that wait for it.
"""

import faulthandler
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal

from data.storage.files import timestamp

log = logging.getLogger(__name__)


Phase = Literal["start", "data", "d", "g", "log", "sampling", "checkpoint", "end"]


EXIT_CODE = 75
"""Of a rank that its watchdog has ended: EX_TEMPFAIL, it is worth trying again."""


SLOW: frozenset[Phase] = frozenset({"start", "sampling", "checkpoint", "end"})
"""Phases that may take long. While rank 0 draws a grid, the others wait for it inside their next step, so the allowance
lasts until a step has been done in the usual time again."""


_GRACE_S = 30.0


class Watchdog:
    """Watches one rank; entering it as a context starts it.

    Args:
        limit_s: longest stay in one phase of a step; None: it never bites.
        allowance_s: how much longer slow phases may take. A rank waits that long for the others anyway.
        rank: names the file.
        directory: of the run, gets the file.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        limit_s: float | None,
        *,
        allowance_s: float = 0.0,
        rank: int = 0,
        directory: Path = Path(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit_s, self._allowance_s = limit_s, allowance_s
        self._rank, self._file = rank, directory / f"watchdog-rank-{rank}.txt"
        self._clock = clock
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._slow = True
        self.enter("start")

    def enter(self, phase: Phase) -> None:
        """The rank goes on to `phase`."""
        if phase in SLOW:
            self._slow = True
        self._at = (phase, self._clock())  # one assignment: the thread never sees half of it

    def end_step(self) -> None:
        """A step is done: the next one has no allowance, unless something slow comes first."""
        self.enter("log")  # before the allowance goes: the time that it was for lies behind
        self._slow = False

    def __enter__(self) -> "Watchdog":
        if self._limit_s is not None:
            self._arm(self._limit_s)
            self._thread = threading.Thread(target=self._watch, args=(self._limit_s,), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def standing(self) -> tuple[Phase, float, float]:
        """The phase, how long the rank has been in it, and how long it may be; seconds."""
        slow = self._slow  # read first: should a slow phase end in between, its allowance must not be gone before it
        phase, since = self._at
        allowed_s = math.inf if self._limit_s is None else self._limit_s + (self._allowance_s if slow else 0.0)
        return phase, self._clock() - since, allowed_s

    def _watch(self, limit_s: float) -> None:
        while not self._ended.wait(min(limit_s / 10, 5.0)):
            phase, still_s, allowed_s = self.standing()
            if still_s > allowed_s:
                self._bite(phase, still_s, allowed_s)
            self._arm(limit_s)

    def _arm(self, limit_s: float) -> None:
        """For the case that the thread is not let run again, or hangs in a file system while it bites."""
        _, still_s, allowed_s = self.standing()
        left_s = max(0.0, allowed_s - still_s)
        faulthandler.dump_traceback_later(left_s + min(limit_s, _GRACE_S), exit=True, file=2)

    def _bite(self, phase: Phase, still_s: float, allowed_s: float) -> None:
        message = (
            f"watchdog: rank {self._rank} (process {os.getpid()}) has stood still in phase {phase} for {still_s:.1f} "
            f"s, allowed are {allowed_s:g} (scaling.watchdog_s). It ends with code {EXIT_CODE}; the run can be resumed"
        )
        report = f"{message}\n{_stacks()}"
        os.write(2, report.encode())  # at once: all ranks of a group bite together, often into one log
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write(f"{timestamp()} {report}")
        except OSError as error:
            log.error("cannot write %s: %s", self._file, error)
        sys.stderr.flush()
        os._exit(EXIT_CODE)


def _stacks() -> str:
    """Where every thread stands, innermost call first. No source line is read: the disk may be what hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, innermost in sys._current_frames().items():
        lines.append(f"Thread {names.get(ident, ident)} (most recent call first):")
        frame: FrameType | None = innermost
        while frame:
            lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}')
            frame = frame.f_back
    return "\n".join(lines) + "\n"
