"""Uploads the spool of a run to a tracker, in a process for each, so that only this one ever waits for it.

The server may be down, hang, or accept a batch without confirming it, and this process may be killed at any moment.
Progress is saved after a batch is accepted; later records may or may not be at the server. So every call can be
repeated: a run is found again by a tag, a file has a fixed name, and before metrics are sent that may have been sent
before, the server is asked which steps it has.
"""

import fcntl
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.storage.files import sync_file
from data.storage.redaction import redact
from trainer.tracking.sink import Point, RefusedError, RunGoneError, Sink
from trainer.tracking.spool import (
    Progress,
    Record,
    RunRecords,
    count_left,
    is_closed,
    last_close,
    load_progress,
    read_records,
    save_progress,
    spool_path,
    uploader_folder,
)

log = logging.getLogger(__name__)

MAX_RECORDS = 200  # read, and confirmed, at a time
FIRST_REQUEST_S, LONGEST_REQUEST_S = 10.0, 120.0
LONGEST_CALL_S, LONGEST_UPLOAD_S = 600.0, 3600.0  # total for all requests of one call
LONGEST_PAUSE_S = 30.0
REMIND_S = 600.0


@contextmanager
def upload_lock(run_directory: Path, backend: str, keep_waiting: Callable[[], bool]) -> Iterator[None]:
    """Hold the right to upload the spool of a run to one tracker; only one process can hold it.

    Args:
        run_directory: folder of the run.
        backend: the tracker.
        keep_waiting: called twice a second while another process holds it.

    Raises:
        BlockingIOError: another process holds it, and `keep_waiting` returned False.
    """
    path = uploader_folder(run_directory, backend) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", errors="replace") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not keep_waiting():
                    file.seek(0)
                    holder = file.read().strip()
                    raise BlockingIOError(
                        f"process {holder} is uploading {run_directory} to {backend} already"
                    ) from None
                time.sleep(0.5)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class Uploader:
    """The loop: read new records, send them, save the progress; on failure wait and repeat."""

    def __init__(
        self,
        run_directory: Path,
        backend: str,
        sink: Sink,
        *,
        target: str,
        hide: Callable[[str], str] = redact,
        timeout_s: float,
        trainer_lives: Callable[[], bool],
        poll_s: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        watchdog: Callable[[float], object] = lambda seconds: None,
    ):
        """Prepare to continue where the last upload to this target ended.

        Args:
            run_directory: folder of the run.
            backend: the tracker, by which its progress is saved.
            sink: the tracker itself.
            target: where it is, a URI without password; saved with the progress.
            hide: replaces secrets in the text of an error.
            timeout_s: once the spool is closed or the trainer dead, give up after failing for this long.
            trainer_lives: whether more records may still come.
            poll_s: time between checks of the spool, in s.
            clock: monotonic seconds.
            sleep: waits for seconds.
            watchdog: called before each sink call with its time limit in s, and after it with 0. It ends the process
                if a call hangs despite the limit of its requests.
        """
        self._directory = run_directory
        self._backend = backend
        self._spool = spool_path(run_directory)
        self._sink = sink
        self._timeout_s = timeout_s
        self._trainer_lives = trainer_lives
        self._poll_s = poll_s
        self._clock = clock
        self._sleep = sleep
        self._watchdog = watchdog
        self._hide = hide
        self._run = RunRecords(self._spool)
        self._noted = _checked(load_progress(run_directory, backend, target, self._run.uid), self._spool)
        self._go_back()
        self._attached = False
        self._doubt_until = self._spool.stat().st_size
        self._known: dict[str, set[int]] = {}
        self._request_s = FIRST_REQUEST_S
        self._reminded = -REMIND_S
        self._failed_at = -1
        self._superseded = False  # another run begins after the records of this one
        self._died = False  # the last record sent is no close
        self._files_due = 0.0

    def run(self) -> int:
        """Upload until all is sent and the spool is closed or the trainer dead. Returns the number of records left."""
        last_good, next_try, pause_s = self._clock(), 0.0, 1.0
        ending_since: float | None = None
        while True:
            # Checked before reading, so that all that a trainer wrote before it died is read.
            lives = self._trainer_lives()
            closed = is_closed(self._spool)
            began, offset = self._clock(), self._noted.offset
            if lives and not closed:
                ending_since = None
            elif ending_since is None:
                ending_since = next_try = began  # time is limited from here on
                self._files_due = began
            if began < next_try:
                self._sleep(min(self._poll_s, next_try - began))
                continue
            left_s = LONGEST_REQUEST_S
            if ending_since is not None:
                left_s = max(last_good, ending_since) + self._timeout_s - began
            self._sink.limit_requests(max(1.0, min(self._request_s, left_s)))
            try:
                worked = self._send_some()
                if not worked and ending_since is not None:
                    if self._died if self._superseded else not closed:
                        self._mark_failed()
                    return len(self._noted.waiting)
            except Exception as error:  # any error of a network, database or plugin: try again
                if self._noted.offset > offset:
                    last_good, pause_s = self._clock(), 1.0
                self._note_failure(error, began)
                if ending_since is not None and self._clock() - max(last_good, ending_since) >= self._timeout_s:
                    return count_left(self._spool, self._noted)
                next_try = self._clock() + (pause_s if ending_since is None else 1.0)
                pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
                continue
            last_good, pause_s = self._clock(), 1.0
            if not worked:
                self._sleep(self._poll_s)

    def _send_some(self) -> bool:
        records = self._read()
        if not records:
            return self._send_waiting()
        # Records noted as sent must survive a power cut, or new ones at their offsets would count as sent.
        with suppress(OSError):  # some file systems cannot sync
            sync_file(self._spool)
        with self._limit(LONGEST_CALL_S):
            if self._attach():
                return True
        for group in _groups([record for record in records if self._run.own(record)]):
            try:
                self._send(group)
                refused = 0
            except (RefusedError, FileNotFoundError) as error:
                refused = self._send_singly(group, error)
            except Exception as error:
                if not self._can_wait(group[0], error):
                    raise
                continue
            self._note(offset=group[-1].end, refused=self._noted.refused + refused, trouble=None)
        self._note(offset=records[-1].end)
        self._died = records[-1].kind != "close"
        return True

    def _read(self) -> list[Record]:
        """The next records, up to one that begins another run: that is for another process."""
        records = []
        for record in itertools.islice(read_records(self._spool, self._noted.offset), MAX_RECORDS):
            if self._run.begins_another(record):
                self._superseded = True
                break
            records.append(record)
        return records

    def _can_wait(self, record: Record, error: Exception) -> bool:
        """Whether the record is a file that fails although the server answers; the records after it then go first."""
        if record.kind not in ("image", "artifact") or isinstance(error, RunGoneError):
            return False
        if record.start != self._failed_at and not self._noted.waiting:
            self._failed_at = record.start  # it fails again after the next attach, unless the server itself was down
            return False
        self._note_files([*self._noted.waiting, record.start], error)
        self._note(offset=record.end)
        return True

    def _send_waiting(self) -> bool:
        """Try the files that the server could not store, from time to time. Returns whether any was sent."""
        if not self._noted.waiting or self._clock() < self._files_due:
            return False
        with self._limit(LONGEST_CALL_S):
            if self._attach():
                return True
        for count, start in enumerate(list(self._noted.waiting)):
            record, refused = next(read_records(self._spool, start)), 0
            try:
                self._send([record])
            except (RefusedError, FileNotFoundError) as error:
                refused = self._send_singly([record], error)
            except RunGoneError:
                raise
            except Exception as error:
                self._files_due = self._clock() + REMIND_S
                self._note_files(self._noted.waiting, error)
                return count > 0
            waiting = tuple(offset for offset in self._noted.waiting if offset != start)
            self._note(waiting=waiting, refused=self._noted.refused + refused)
        self._note(files_trouble=None)
        log.info("the server has all files now")
        return True

    def _note_files(self, waiting: Sequence[int], error: Exception) -> None:
        trouble = self._shown(error)
        if trouble != self._noted.files_trouble:
            log.warning("files wait, and curves go first; will try again: %s", trouble)
        self._note(waiting=tuple(waiting), files_trouble=trouble)

    def _attach(self) -> bool:
        """Find or create the run. Returns whether it is not the recorded one: everything is then sent again."""
        if self._attached:
            return False
        run_id, created = self._sink.attach(self._run.opening, self._noted.run_id)
        if created:
            self._doubt_until = 0
        anew = self._noted.run_id is not None and run_id != self._noted.run_id
        self._note(run_id=run_id)
        if anew:
            self._note(offset=0, waiting=())
        if self._trainer_lives():
            self._sink.set_status("RUNNING", None)
        self._attached = True
        return anew

    def _send(self, group: Sequence[Record]) -> None:
        first = group[0]
        file = self._directory / first.payload.get("path", "")
        with self._limit(LONGEST_UPLOAD_S if first.kind == "artifact" else LONGEST_CALL_S):
            match first.kind:
                case "open":
                    self._sink.describe(first)
                    self._sink.set_status("RUNNING", None)
                case "metrics":
                    self._send_metrics(group)
                case "image":
                    self._sink.send_image(first.payload["key"], first.step or 0, first.at, _existing(file))
                case "artifact":
                    self._sink.send_artifact(_existing(file), first.payload["folder"])
                    if name := first.payload.get("register_as"):
                        self._sink.register_model(file.parent, name)
                case "close":
                    self._sink.set_status(first.payload["status"], first.at)

    def _send_metrics(self, group: Sequence[Record]) -> None:
        points = [
            Point(key=key, value=value, step=record.step or 0, at=record.at)
            for record in group
            for key, value in record.payload["metrics"].items()
        ]
        if group[0].start < self._doubt_until:
            for key in {point.key for point in points} - self._known.keys():
                self._known[key] = self._sink.known_steps(key)
            points = [point for point in points if point.step not in self._known[point.key]]
            for point in points:
                self._known[point.key].add(point.step)
        else:
            self._known.clear()
        if points:
            self._sink.send_points(points)

    def _send_singly(self, group: Sequence[Record], error: Exception) -> int:
        """After a refusal of the group, send each record alone and skip the refused ones. Returns how many."""
        if len(group) == 1:
            log.warning("passed over %s of step %s: %s", group[0].kind, group[0].step, self._hide(str(error)))
            return 1
        self._doubt(group[-1].end)
        refused = 0
        for record in group:
            try:
                self._send([record])
            except RefusedError as alone:
                refused += self._send_singly([record], alone)
        return refused

    def _mark_failed(self) -> None:
        """Mark the run as failed: the trainer died without closing the spool."""
        with self._limit(LONGEST_CALL_S):
            if self._noted.run_id is None:
                return
            self._attach()
            self._sink.set_status("FAILED", None)

    def _go_back(self) -> None:
        """Begin again after the last confirmed record: what came since may be lost with a process of the tracker."""
        if self._sink.is_buffered:
            offset = last_close(self._spool, self._noted.offset)
            waiting = tuple(start for start in self._noted.waiting if start < offset)
            self._noted = replace(self._noted, offset=offset, waiting=waiting)

    def _note_failure(self, error: Exception, began: float) -> None:
        if isinstance(error, RunGoneError):
            self._note(run_id=None, offset=0, waiting=())
        self._attached = False
        self._go_back()
        self._doubt(self._spool.stat().st_size)
        if self._clock() - began >= 0.9 * self._request_s:
            self._request_s = min(LONGEST_REQUEST_S, 2 * self._request_s)  # the server may be slow rather than down
        trouble = self._shown(error)
        if trouble != self._noted.trouble or self._clock() - self._reminded >= REMIND_S:
            log.warning("not uploaded, will try again: %s", trouble)
            self._reminded = self._clock()
            self._note(trouble=trouble)

    def _shown(self, error: Exception) -> str:
        lines = self._hide(str(error)).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:500]}"

    def _doubt(self, until: int) -> None:
        """Note that records before this byte may be at the server although not saved as sent."""
        self._doubt_until = max(self._doubt_until, until)
        self._known.clear()

    def _note(self, **changes: Any) -> None:
        changed = replace(self._noted, **changes)
        if changed == self._noted:
            return
        self._noted: Progress = changed
        try:
            save_progress(self._directory, self._backend, changed)
        except OSError as error:  # a later process then asks the server
            log.warning("cannot note the progress: %s", error)

    @contextmanager
    def _limit(self, seconds: float) -> Iterator[None]:
        self._watchdog(seconds)
        try:
            yield
        finally:
            self._watchdog(0)


def _checked(noted: Progress, spool: Path) -> Progress:
    """The progress, without places at which the spool has no record: one of the two files was damaged or replaced."""
    if noted.offset:
        with spool.open("rb") as file:
            file.seek(noted.offset - 1)
            if file.read(1) != b"\n":
                noted = replace(noted, offset=0, waiting=())
    if noted.waiting:
        files = {record.start for record in read_records(spool) if record.kind in ("image", "artifact")}
        noted = replace(noted, waiting=tuple(sorted(files.intersection(noted.waiting))))
    return noted


def _groups(records: Sequence[Record]) -> Iterator[list[Record]]:
    """Group adjacent metrics records; others stay alone. Keeps the order of the spool."""
    for is_metrics, group in itertools.groupby(records, key=lambda record: record.kind == "metrics"):
        found = list(group)
        yield from [found] if is_metrics else ([record] for record in found)


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is gone")
    return file
