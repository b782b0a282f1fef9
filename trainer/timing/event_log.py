"""The event log of a run: `RUN/events/rank-0.jsonl` and `RUN/events/driver.jsonl`, each line a JSON object.

One process at a time appends to a file. A killed process may leave half a line; the next one begins a new line, and
readers pass over what is no record. Each record has at least

    {"kind": "start", "at": 1700000000.123, "start": "1f0c..."}

at: wall-clock time in s since 1970. start: names the process that wrote it, so that two that overlap stay apart.
"""

import json
import logging
import os
import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger(__name__)

Writer = Literal["rank-0", "driver"]
LATEST_S = 1e11
"""A record of a later time, of the year 5138, is damaged."""
CLOSE_S = 5.0
"""Longest wait at the end for a disk that does not answer."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of the log."""

    kind: str
    """What happened."""
    at: float
    """When, in s since 1970."""
    start: str
    """The process that wrote it."""
    fields: dict[str, Any]
    """The rest of the line, of any JSON types: a reader checks what it uses."""


def events_file(run_directory: Path, writer: Writer) -> Path:
    """The event log of one writer."""
    return run_directory / "events" / f"{writer}.jsonl"


def read_events(file: Path) -> list[Event]:
    """The records of a log in the order of the file; none if there is no such file.

    A line that is no record is passed over: the torn last line of a killed process, or a damaged one.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError:
        return []
    events = []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            fields = json.loads(line)
            kind, at, start = (fields.pop(name) for name in ("kind", "at", "start"))
            if isinstance(kind, str) and isinstance(start, str) and type(at) in (int, float) and 0 <= at < LATEST_S:
                events.append(Event(kind=kind, at=float(at), start=start, fields=fields))
    return events


class EventLog:
    """Appends records from a thread of its own: a slow or full disk neither delays nor ends the process."""

    def __init__(self, file: Path, standing: Callable[[], Mapping[str, Any]], pause_s: Callable[[], float]) -> None:
        """Start the thread.

        Args:
            file: the log; its folder is made.
            standing: the record that is written when none has come for a while.
            pause_s: how long that is, in s.
        """
        self.start = uuid.uuid4().hex[:12]
        self._file, self._standing, self._pause_s = file, standing, pause_s
        self._waiting: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="event-log", daemon=True)
        self._thread.start()

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record, later; it has `kind` and `at`."""
        self._waiting.put(record)

    def close(self) -> None:
        """Wait, but not for long, until all is written."""
        self._waiting.put(None)
        self._thread.join(CLOSE_S)

    def _write_all(self) -> None:
        descriptor: int | None = None
        told = False
        while True:
            try:
                record = self._waiting.get(timeout=self._pause_s())
            except queue.Empty:
                record = self._standing()
            if record is None:
                break
            try:
                descriptor = self._opened() if descriptor is None else descriptor
                os.write(descriptor, json.dumps({**record, "start": self.start}).encode() + b"\n")
            except OSError as error:
                if not told:
                    log.warning("%s: times are not recorded, the run goes on: %s", self._file, error)
                told = True
        if descriptor is not None:
            os.close(descriptor)

    def _opened(self) -> int:
        """The descriptor of the log, which ends with a whole line."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")
        return descriptor
