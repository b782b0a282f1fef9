"""Ends hanging runs: a rank that makes no progress reports its stacks and exits, so that its group is restarted.

A thread of each rank watches the time since the rank entered its current phase. If that is too long, the thread writes
the stacks of all threads to stderr and to RUN/watchdog-rank-N.txt, and ends the process with `EXIT_CODE`. This works
for the usual hang, a collective whose peer is gone or stuck, because a waiting collective releases the GIL. If the main
thread holds the GIL, a small process next to the rank, `sentry`, has it write its stacks to stderr and kills it.

Time in which the process itself is stopped (Ctrl-Z, SIGSTOP, a suspended job, a paused machine) does not count. Ranks
that run and wait for a stopped one count as hanging.
"""

import faulthandler
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal

from data.processes import sentry
from data.storage.files import timestamp

log = logging.getLogger(__name__)

Phase = Literal["start", "data", "d", "g", "log", "sampling", "checkpoint", "profile", "end"]
EXIT_CODE = 75
"""Exit code of a rank that its watchdog has ended: EX_TEMPFAIL, so retrying makes sense."""
SLOW: frozenset[Phase] = frozenset({"start", "sampling", "checkpoint", "profile", "end"})
"""Phases that may take long. While rank 0 draws a grid, the others wait for it in their next step, so the allowance
lasts until the end of the next step."""
_GRACE_S = 30.0
_LOOK_EVERY_S = 5.0
_LATE_S = 1.0
"""A thread that wakes up so much too late was stopped."""


class Watchdog:
    """Watches one rank; a context manager that starts and stops the watching thread.

    Args:
        limit_s: longest time in one phase of a step; None: the watchdog is off.
        allowance_s: additional time for slow phases; a rank waits that long for the others anyway.
        rank: this rank, part of the file name.
        directory: run directory, where the file is written.
        clock: monotonic time in seconds.

    Attributes:
        listeners: are told of each phase that the rank enters.
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
        self._sentry: subprocess.Popen[bytes] | None = None
        self._continued_at = -math.inf
        self._slow = True
        self.listeners: list[Callable[[Phase], None]] = []
        self.enter("start")

    def enter(self, phase: Phase) -> None:
        """Note that the rank enters `phase`."""
        if phase in SLOW:
            self._slow = True
        self._at = (phase, self._clock())  # one assignment, which is atomic for the watching thread
        for tell in self.listeners:
            tell(phase)

    def end_step(self) -> None:
        """Note that a step is done: the next one gets no allowance, unless a slow phase comes first."""
        self.enter("log")  # first, so that the time already spent is not judged without the allowance
        self._slow = False

    def __enter__(self) -> "Watchdog":
        if self._limit_s is not None:
            self._start_sentry()
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
        if self._sentry:
            self._sentry.communicate()  # it ends when its input does
            faulthandler.unregister(sentry.STACKS_SIGNAL)

    def standing(self) -> tuple[Phase, float, float]:
        """The phase, how long the rank has been in it, and how long it may be, in seconds."""
        slow = self._slow  # read before the phase: if a slow phase ends in between, it still gets its allowance
        phase, since = self._at
        allowed_s = math.inf if self._limit_s is None else self._limit_s + (self._allowance_s if slow else 0.0)
        return phase, self._clock() - max(since, self._continued_at), allowed_s

    def _watch(self, limit_s: float) -> None:
        pause_s, looked_at = min(limit_s / 10, _LOOK_EVERY_S), self._clock()
        while not self._ended.wait(pause_s):
            self._note_time(looked_at, pause_s)
            looked_at = self._clock()
            phase, still_s, allowed_s = self.standing()
            if still_s > allowed_s:
                self._end_process(phase, still_s, allowed_s)
            self._arm(limit_s)

    def _note_time(self, looked_at: float, pause_s: float) -> None:
        """Start the time of the phase anew if the process was stopped since `looked_at`."""
        now = self._clock()
        if now - looked_at > pause_s + max(pause_s, _LATE_S):
            self._continued_at = now

    def _start_sentry(self) -> None:
        faulthandler.register(sentry.STACKS_SIGNAL, file=2, all_threads=True)
        command = [sys.executable, "-I", "-S", sentry.__file__, str(self._rank)]
        self._sentry = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self._sentry.stdin
        os.set_blocking(self._sentry.stdin.fileno(), False)

    def _arm(self, limit_s: float) -> None:
        """Have the process killed if this thread never runs again, or hangs in a file system while it reports."""
        _, still_s, allowed_s = self.standing()
        left_s = max(0.0, allowed_s - still_s)
        assert self._sentry and self._sentry.stdin
        with suppress(OSError):  # it was killed, or stopped for so long that the pipe is full
            os.write(self._sentry.stdin.fileno(), sentry.record(left_s + min(limit_s, _GRACE_S)))

    def _end_process(self, phase: Phase, still_s: float, allowed_s: float) -> None:
        message = (
            f"watchdog: rank {self._rank} (process {os.getpid()}) has made no progress in phase {phase} for "
            f"{still_s:.1f} s; {allowed_s:g} s are allowed (scaling.watchdog_s). It exits with code {EXIT_CODE}; the "
            "run can be resumed"
        )
        report = f"{message}\n{_stacks()}"
        os.write(2, report.encode())  # in one call: all ranks of a group report at once, often to the same log
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{timestamp()} {report}")
        except OSError as error:
            log.error("cannot write %s: %s", self._file, error)
        sys.stderr.flush()
        os._exit(EXIT_CODE)


def _stacks() -> str:
    """The stack of every thread, innermost call first. Reads no source lines, because the disk may be what hangs."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, innermost in sys._current_frames().items():
        lines.append(f"Thread {names.get(ident, ident)} (most recent call first):")
        frame: FrameType | None = innermost
        while frame:
            lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno} in {frame.f_code.co_name}')
            frame = frame.f_back
    return "\n".join(lines) + "\n"
