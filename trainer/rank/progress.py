"""What a run reports to its driver, and the progress bar that shows it.

It loads no torch, because the driver's state actor would start two seconds later.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.processes.signals import StopRequest, handle_stop_signals

LOG_INTERVAL_S = 60.0
"""Time between two progress log lines if there is no terminal."""


@dataclass(frozen=True)
class RunStatus:
    """State of a run after a step.

    Attributes:
        step: optimizer steps done.
        images, total_images: training images seen, and planned.
        images_per_s: rate at the last log point, 0 before the first.
        losses: losses at the last log point.
    """

    step: int
    images: int
    total_images: int
    images_per_s: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: whether the planned number of images was reached; otherwise the same command resumes the run.
        step, images: total optimizer steps and training images.
        checkpoint: the last checkpoint.
        samples: the last grid of samples, or None.
        snapshot: averaged weights of a finished run, or None.
    """

    finished: bool
    step: int
    images: int
    checkpoint: str
    samples: str | None
    snapshot: str | None


class Driver(Protocol):
    """The worker's interface to the process that started it."""

    def report(self, status: RunStatus) -> None:
        """Called on rank 0 after each step; must return at once."""
        ...

    def show(self, curves: Mapping[str, float]) -> None:
        """Called on rank 0 with the curves of a log point; must return at once."""
        ...

    def stop_requested(self) -> bool:
        """Whether this rank has been asked to stop; polled after each step."""
        ...


class ProgressBar:
    """A bar on a terminal: images, images/s, losses, time left. Elsewhere a log line per minute, and at the end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
        clock: monotonic seconds.
        """
        self._log, self._clock = logging.getLogger(__name__), clock
        self._terminal = sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("images"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=None, detail="")
        self._logged_at, self._logged_images = clock(), -1

    def __enter__(self) -> "ProgressBar":
        if self._terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            with suppress(OSError):  # the terminal is gone
                self._progress.stop()

    def show(self, status: RunStatus) -> None:
        """Draw `status`."""
        losses = "  ".join(f"{name} {value:.3f}" for name, value in status.losses.items())
        detail = f"{status.images_per_s:.0f} images/s  {losses}".rstrip()
        if self._terminal:
            self._progress.update(self._task, completed=status.images, total=status.total_images, detail=detail)
            return
        due = self._clock() - self._logged_at >= LOG_INTERVAL_S or status.images == status.total_images
        if due and status.images != self._logged_images:
            self._logged_at, self._logged_images = self._clock(), status.images
            left_s = (status.total_images - status.images) / status.images_per_s if status.images_per_s else None
            eta = f"  {left_s:.0f} s left" if left_s else ""
            self._log.info("%d of %d images  %s%s", status.images, status.total_images, detail, eta)


class SignalDriver:
    """The driver of a worker without Ray: signals request a stop; on rank 0 a bar shows the progress."""

    def __init__(self, bar: ProgressBar | None) -> None:
        self._bar = bar
        self._stop = StopRequest()
        handle_stop_signals(self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        if self._stop.note():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def report(self, status: RunStatus) -> None:
        """Update the bar."""
        if self._bar:
            self._bar.show(status)

    def show(self, curves: Mapping[str, float]) -> None:
        """Nothing: the trackers have them."""

    def stop_requested(self) -> bool:
        """Whether a signal was received."""
        return self._stop.asked
