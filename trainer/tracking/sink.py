"""The uploader's interface to a tracker. To add one, write a file with a `Sink`, and add it to `SINKS`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trainer.tracking.spool import Record


class RefusedError(Exception):
    """The server rejects a record as invalid; sending it again would not help."""


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
    """A tracker, such as a server, as seen by one run.

    It is created as `MySink(uri, run_directory)`, with the URI of `tracker_uri`, only in its uploader process. Its
    library is imported inside methods, because the command lists all sinks and a process uses one. Creating it opens no
    connection. Calls come one at a time from one thread, `attach` before all others except `limit_requests`.

    Errors: after a `RefusedError` the record is skipped, logged, and counted as lost. After a `RunGoneError` the whole
    spool is sent again, to a new run. Any other exception means "try again later": the uploader waits, calls `attach`
    again and repeats what it was sending. No method retries, or waits longer than `limit_requests` allows, except for
    the upload of what a library has buffered.

    Repetition: the answer to a call may be lost, and the uploader may be killed in the middle of one. So a call may be
    repeated with the same arguments, and must then change nothing. Only `send_points` is not repeated blindly: the
    uploader first asks `known_steps` and leaves out what has arrived, so that every point arrives once.
    """

    is_buffered: bool
    """Whether points that it has taken can be lost with the process, until `set_status` ends the run. If so, each
    process begins after the last record that ended the run, and sends again what the tracker lacks."""

    def limit_requests(self, timeout_s: float) -> None:
        """Limit the duration of each further request, in seconds. Called before every attempt."""
        ...

    def attach(self, opening: Record, run_id: str | None) -> tuple[str, bool]:
        """Find the run, or create it if the server does not have it.

        Args:
            opening: the first record of the spool. Its payload holds uid (the same for each process of the run),
                run_name, experiment, and run_id (the server's id from a checkpoint, or None).
            run_id: the server's id that an earlier `attach` returned, or None. The run is searched by this, then by
                the payload's run_id, then by its uid.

        Returns:
            The server's id of the run, and whether this call created it.
        """
        ...

    def describe(self, opening: Record) -> None:
        """Send the params and tags (str to str, in the payload) of a process that started or resumed the run."""
        ...

    def set_status(self, status: str, at: int | None) -> None:
        """Set the status (RUNNING, FINISHED, KILLED or FAILED) and, if known, the end (`at`, ms since 1970)."""
        ...

    def known_steps(self, key: str) -> set[int]:
        """Steps at which the server has a point of this curve."""
        ...

    def send_points(self, points: Sequence[Point]) -> None:
        """Send points of any number of curves, in order. After an exception, some of them may have arrived."""
        ...

    def send_image(self, key: str, step: int, at: int, file: Path) -> None:
        """Send the image of a series (`key`) at a step; `at` is its time in ms since 1970."""
        ...

    def send_artifact(self, file: Path, folder: str | None) -> None:
        """Upload a file to a folder of the run's artifacts; None: to their root. It replaces a file of that name."""
        ...

    def register_model(self, snapshot: Path, name: str) -> None:
        """Make the folder of a snapshot a version of the registered model of this name, once for each run and folder.

        A tracker without a registry of models does nothing.
        """
        ...
