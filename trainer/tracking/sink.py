"""What `delivery` asks of a tracking server, so that its loop is tested without one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainer.tracking.spool import Record


class RefusedError(Exception):
    """The server calls a record invalid; sending it again would not help."""


class RunGoneError(Exception):
    """The server does not know the run: its database was replaced."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value of one curve."""

    key: str
    """Name of the curve."""
    value: float
    """Its value, nan and inf included."""
    step: int
    """Optimizer step."""
    at: int
    """Wall-clock time in ms since 1970."""


class Sink(Protocol):
    """A tracking server. Any exception but `RefusedError` and `RunGoneError` means: try again later."""

    def limit_requests(self, timeout_s: float) -> None:
        """Give up a request after this long."""
        ...

    def attach(self, opening: Record, run_id: str | None) -> tuple[str, bool]:
        """Find the run by `run_id` or by its uid, or create it. Returns its id, and whether it was created."""
        ...

    def describe(self, opening: Record) -> None:
        """Send the params and tags with which a process opened the run."""
        ...

    def set_status(self, status: str, at: int | None) -> None:
        """Set the run's status, and its end time unless that is None."""
        ...

    def known_steps(self, key: str) -> set[int]:
        """Steps at which the server has a point of this curve."""
        ...

    def send_points(self, points: Sequence[Point]) -> None:
        """Send metrics, all or none."""
        ...

    def send_image(self, key: str, step: int, at: int, file: Path) -> None:
        """Send an image; once or twice makes no difference."""
        ...

    def send_artifact(self, file: Path, folder: str | None) -> None:
        """Send a file; once or twice makes no difference."""
        ...
