"""What the uploader asks of a tracking server. A second tracker is one file with a `Sink`, and its name in `SINKS`."""

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
    """A tracking server, as one run sees it.

    It is made as `MySink(uri, run_directory)`, in the uploader process alone. Its library is imported inside methods,
    because the command lists all sinks and a run uses one. Making it opens no connection. Calls come one at a time
    from one thread, `attach` before all others but `limit_requests`.

    Errors: `RefusedError` passes over what was sent; it is logged, and counted as lost. `RunGoneError` has the whole
    spool sent again, to a new run. Any other exception means "try again later": the uploader waits, calls `attach`
    again and repeats what it was sending. No method retries, or waits longer than `limit_requests` allows.

    Repetition: the answer to a call may be lost, and the uploader may be killed in the middle of one. So each call may
    come again with the same arguments, and must then change nothing. `send_points` alone is not repeated blindly: the
    uploader first asks `known_steps` and leaves out what has arrived, so that every point arrives once.
    """

    def limit_requests(self, timeout_s: float) -> None:
        """Let each request from now on take this long at most, in seconds. Called before every attempt."""
        ...

    def attach(self, opening: Record, run_id: str | None) -> tuple[str, bool]:
        """Find the run, or create it if the server has none.

        Args:
            opening: the first record of the spool. Its payload holds uid (the same for each process of the run),
                run_name, experiment, and run_id (the server's id as a checkpoint knows it, or None).
            run_id: the server's id that an earlier `attach` returned, or None. The run is looked for by this, then by
                the payload's run_id, then by its uid.

        Returns:
            The server's id of the run, and whether this call created it.
        """
        ...

    def describe(self, opening: Record) -> None:
        """Send params and tags (str to str, in the payload) of a process that started or resumed the run."""
        ...

    def set_status(self, status: str, at: int | None) -> None:
        """Set the status: RUNNING, FINISHED, KILLED or FAILED; and the end (`at`, ms since 1970) if it is known."""
        ...

    def known_steps(self, key: str) -> set[int]:
        """Steps at which the server has a point of this curve."""
        ...

    def send_points(self, points: Sequence[Point]) -> None:
        """Send points of any number of curves, in order. After an exception any part of them may have arrived."""
        ...

    def send_image(self, key: str, step: int, at: int, file: Path) -> None:
        """Send the picture of a series (`key`) at a step; `at` is its time in ms since 1970."""
        ...

    def send_artifact(self, file: Path, folder: str | None) -> None:
        """Send a file into a folder of the run's files, or (None) to their top. It replaces one of the same name."""
        ...
