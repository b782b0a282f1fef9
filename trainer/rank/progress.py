"""What a run tells its driver while it goes on, and the one bar that shows it."""

import logging
import os
import signal
import sys
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class RunStatus:
    """State of a run after a step.

    Attributes:
        step: optimizer steps done.
        images, total_images: training images seen, and planned.
        images_per_s: at the last log point, 0 before the first.
        losses: at the last log point.
    """

    step: int
    images: int
    total_images: int
    images_per_s: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)


class Driver(Protocol):
    """The worker's line to whoever started it."""

    def report(self, status: RunStatus) -> None:
        """Called by rank 0 after each step; must return at once."""
        ...

    def stop_requested(self) -> bool:
        """Whether this rank has been asked to stop; polled after each step."""
        ...


class ProgressBar:
    """One bar on a terminal: images, images/s, losses, time left. Elsewhere `NUM_LINES` log lines over the run."""

    NUM_LINES = 20

    def __init__(self) -> None:
        self._log = logging.getLogger(__name__)
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
        self._lines_written = 0

    def __enter__(self) -> "ProgressBar":
        if self._terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._progress.stop()

    def show(self, status: RunStatus) -> None:
        """Draw `status`."""
        losses = "  ".join(f"{name} {value:.3f}" for name, value in status.losses.items())
        detail = f"{status.images_per_s:.0f} images/s  {losses}"
        self._progress.update(self._task, completed=status.images, total=status.total_images, detail=detail)
        due = status.images * self.NUM_LINES // status.total_images
        if not self._terminal and due > self._lines_written:
            self._lines_written = due
            left_s = (status.total_images - status.images) / status.images_per_s if status.images_per_s else None
            eta = f"  {left_s:.0f} s left" if left_s is not None else ""
            self._log.info("%d of %d images  %s%s", status.images, status.total_images, detail, eta)


class SignalDriver:
    """The driver of a worker without Ray: SIGTERM and SIGINT ask it to stop, a bar on rank 0 shows how far it is."""

    def __init__(self, bar: ProgressBar | None) -> None:
        self._bar = bar
        self._stop = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        if self._stop:  # asked twice: the user does not want to wait
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._stop = True

    def report(self, status: RunStatus) -> None:
        """Draw the bar."""
        if self._bar:
            self._bar.show(status)

    def stop_requested(self) -> bool:
        """Whether a signal came."""
        return self._stop
