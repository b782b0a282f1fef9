"""How long a process has been in each of its phases, as records of the event log.

    {"kind": "start", "at": ..., "step": null, "phase": "start", "seconds": {"start": 4.1}, "world_size": 2, ...}
    {"kind": "phase", "at": ..., "step": 40, "phase": "checkpoint", "seconds": {"start": 5.2, "data": 0.1, ...}}
    {"kind": "standing", ...}  the same, written from time to time
    {"kind": "resumed", ...}   the same, when the state of `step` has been loaded; what had been done after it is lost
    {"kind": "end", ..., "status": "FINISHED"}

seconds: in each phase since the start, so that a lost line costs nothing but detail. step: optimizer steps done.
"""

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from trainer.timing.event_log import EventLog

START = "start"
"""The phase in which a process begins."""
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Between two records of where the process stands: a thousandth of its time so far, but no less and no more."""


def process_began() -> float:
    """When this process was started, in s since 1970."""
    # Linux knows it since the boot, and psutil adds the time of the boot, which it knows to a second.
    since_boot = psutil.Process().create_time() - psutil.boot_time()
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)


class TimeSheet:
    """Adds up phases. Without a file it does nothing."""

    def __init__(
        self,
        file: Path | None,
        *,
        since: float | None = None,
        recorded: Iterable[str] = (),
        warms_up: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        **facts: Any,
    ) -> None:
        """Begin in the phase `START`.

        Args:
            file: the event log.
            since: when the process began, in s since 1970; None: now.
            recorded: phases whose beginning is recorded; the others are only added up.
            warms_up: whatever phases are entered, START lasts until the first step is done: in it code is compiled.
            clock: monotonic time in s.
            wall_clock: time in s since 1970.
            facts: further fields of the first record, of JSON types.
        """
        self._clock, self._wall_clock, self._recorded = clock, wall_clock, frozenset(recorded)
        self._lock = threading.Lock()
        self._began = self._since = clock()
        self._phase, self._warms_up, self._starting = START, warms_up, warms_up
        self._step: int | None = None
        before = 0.0 if since is None else max(0.0, wall_clock() - since)
        self._seconds = {START: before}
        self._log = EventLog(file, lambda: self._record("standing"), self._pause_s) if file else None
        self.tell("start", **facts)

    def enter(self, phase: str) -> None:
        """Note that the process enters `phase`, or still is in it."""
        if self._log is None:
            return
        with self._lock:
            self._add_up()
            self._starting = self._starting or (self._warms_up and phase == START)
            before, self._phase = self._phase, phase
        if phase in self._recorded and phase != before:
            self.tell("phase")

    def end_step(self, step: int) -> None:
        """Note that `step` optimizer steps are done."""
        if self._log is None:
            return
        with self._lock:
            self._add_up()
            self._starting, self._step = False, step

    def resume(self, step: int) -> None:
        """Note that the state after `step` steps has been loaded, or that the run begins, with step 0."""
        self._step = step
        self.tell("resumed")

    def tell(self, kind: str, **fields: Any) -> None:
        """Record that something happened, with further fields."""
        if self._log:
            self._log.append(self._record(kind) | fields)

    def close(self, **facts: Any) -> None:
        """Record the end, with further fields, and wait until it is written; a second call does nothing."""
        if self._log is None:
            return
        self.tell("end", **facts)
        self._log.close()
        self._log = None

    def _record(self, kind: str) -> dict[str, Any]:
        with self._lock:
            self._add_up()
            seconds = {phase: round(spent, 4) for phase, spent in self._seconds.items()}
            phase = START if self._starting else self._phase
            return {
                "kind": kind,
                "at": round(self._wall_clock(), 4),
                "step": self._step,
                "phase": phase,
                "seconds": seconds,
            }

    def _add_up(self) -> None:
        now, phase = self._clock(), START if self._starting else self._phase
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
        self._since = now

    def _pause_s(self) -> float:
        return min(max(SHORTEST_PAUSE_S, (self._clock() - self._began) / 1000), LONGEST_PAUSE_S)
