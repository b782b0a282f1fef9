"""What a run tells its tracking server, kept first in a local file of JSON lines that is only ever appended to.

Training only ever appends here; the uploader reads it, in another process, and notes in `delivered.json` how far the
server has taken it. Both files are in `<run directory>/tracking`.

    {"kind": "open", "at": 1700000000000, "step": 100, "uid": ..., "params": {...}, "tags": {...}, ...}
    {"kind": "metrics", "at": ..., "step": 150, "metrics": {"loss_g": 0.7}}
    {"kind": "image", "at": ..., "step": 150, "key": "samples", "path": "samples/000150.png"}
    {"kind": "artifact", "at": ..., "step": null, "path": "snapshots/final.safetensors", "folder": "snapshots", ...}
    {"kind": "close", "at": ..., "step": null, "status": "FINISHED"}
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data.storage.files import replaced

log = logging.getLogger(__name__)


Kind = Literal["open", "metrics", "image", "artifact", "close"]
Status = Literal["FINISHED", "KILLED", "FAILED"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the spool."""

    kind: Kind
    """What it holds."""
    at: int
    """Wall-clock time of the append, in ms since 1970; the server shows it as the time of the point."""
    step: int | None
    """Optimizer step, where the record belongs to one."""
    payload: dict[str, Any]
    """The other fields of the line, by kind."""
    start: int
    """Byte offset of the line."""
    end: int
    """Byte offset behind its newline."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far one server has taken the spool."""

    target: str = ""
    """The server's URI without its password. Another server starts at offset 0."""
    run_id: str | None = None
    """That server's id of the run."""
    offset: int = 0
    """All records before this byte have been taken."""
    refused: int = 0
    """Records that were passed over, because the server called them invalid or their file is gone."""
    trouble: str | None = None
    """Why the last attempt failed; None after one that did not."""


def spool_path(run_directory: Path) -> Path:
    """Where the records of a run are."""
    return run_directory / "tracking" / "spool.jsonl"


def progress_path(run_directory: Path) -> Path:
    """Where the progress of the upload is noted."""
    return run_directory / "tracking" / "delivered.json"


def load_progress(run_directory: Path, target: str) -> Progress:
    """Progress at the server `target`; the start of the spool where none is noted or the note cannot be read."""
    try:
        noted = Progress(**json.loads(progress_path(run_directory).read_text()))
    except (OSError, ValueError, TypeError):
        return Progress(target=target)
    return noted if noted.target == target else Progress(target=target)


def save_progress(run_directory: Path, progress: Progress) -> None:
    """Replace the note in one rename: a reader sees the former one or this one."""
    with replaced(progress_path(run_directory)) as draft:
        draft.write_text(json.dumps(asdict(progress)))


def read_records(path: Path, offset: int = 0) -> Iterator[Record]:
    """Complete records from the byte `offset` on; a last line that is still being written is left for later.

    A line that is no record is passed over: it can only come from a full disk or somebody's editor.
    """
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start, offset = offset, offset + len(line)
            try:
                fields = json.loads(line)
                kind, at, step = (fields.pop(name) for name in ("kind", "at", "step"))
            except (ValueError, TypeError, KeyError, AttributeError):
                log.warning("%s: the line at byte %d is no record, passed over", path, start)
                continue
            yield Record(kind=kind, at=at, step=step, payload=fields, start=start, end=offset)


def count_records(path: Path, offset: int = 0) -> int:
    """Records from the byte `offset` on."""
    try:
        return sum(1 for _ in read_records(path, offset))
    except OSError:
        return 0


def is_closed(path: Path) -> bool:
    """Whether the last record is a close, from the end of the file alone: it is asked every second."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 512))
        lines = file.read().splitlines(keepends=True)
    try:
        return lines[-1].endswith(b"\n") and json.loads(lines[-1])["kind"] == "close"
    except (IndexError, KeyError, TypeError, ValueError):
        return False


class Spool:
    """The writing end. It never raises for a disk that does not take a record, and says so once."""

    def __init__(self, run_directory: Path, *, last_step: int | None = None, clock_ms: Callable[[], int] | None = None):
        """Open the spool of a run and repair it.

        Args:
            run_directory: folder of the run.
            last_step: step of the checkpoint that the run resumes from. Steps up to it are already in the spool and
                cannot come again; those after it may be there too, from before the run was killed.
            clock_ms: wall clock in ms, for tests.

        Raises:
            OSError: the folder or the file cannot be written.
        """
        self.path = spool_path(run_directory)
        self.uid = uuid.uuid4().hex
        self._directory = Path(os.path.abspath(run_directory))
        self._clock_ms = clock_ms or (lambda: time.time_ns() // 1_000_000)
        self._keys_at: dict[int, frozenset[str]] = {}
        self._key_sets: dict[frozenset[str], frozenset[str]] = {}
        self._artifacts: set[str] = set()
        self._disk_failed = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._repair()
        self._read_back(-1 if last_step is None else last_step)

    def open(self, *, step: int | None, **payload: Any) -> None:
        """Note that a process starts or resumes the run."""
        self._append("open", step, {"uid": self.uid, **payload})

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one point of each curve, unless the curve has a point at this step."""
        seen = self._keys_at.get(step, frozenset())
        fresh = {key: float(value) for key, value in metrics.items() if f"metric {key}" not in seen}
        if fresh and self._append("metrics", step, {"metrics": fresh}):
            self._remember(step, {f"metric {key}" for key in fresh})

    def image(self, step: int, key: str, path: Path) -> None:
        """Append an image that is a file of the run, unless there is one at this step."""
        if f"image {key}" in self._keys_at.get(step, frozenset()):
            return
        if self._append("image", step, {"key": key, "path": self._relative(path)}):
            self._remember(step, {f"image {key}"})

    def artifact(self, path: Path, folder: str | None) -> None:
        """Append a file of the run, unless this very file (by size and time of change) has been."""
        try:
            state = path.stat()
        except OSError as error:
            log.warning("no artifact: %s", error)
            return
        payload = {"path": self._relative(path), "folder": folder, "stamp": [state.st_size, state.st_mtime_ns]}
        name = json.dumps(payload, sort_keys=True)
        if name not in self._artifacts and self._append("artifact", None, payload):
            self._artifacts.add(name)

    def close(self, status: Status) -> None:
        """Append the end of this process's part of the run, and let go of the file."""
        self._append("close", None, {"status": status})
        os.close(self._file)

    def _append(self, kind: Kind, step: int | None, payload: Mapping[str, Any]) -> bool:
        line = json.dumps({"kind": kind, "at": self._clock_ms(), "step": step, **payload}).encode() + b"\n"
        # Not synced here: the uploader syncs the file before it reads it, so that no step waits for a disk.
        try:
            before = os.fstat(self._file).st_size
            try:
                written = os.write(self._file, line)
                if written < len(line):
                    raise OSError(f"{written} of {len(line)} bytes written")
            except OSError:
                os.ftruncate(self._file, before)
                raise
        except OSError as error:
            if not self._disk_failed:
                log.warning("metrics are being lost, training continues: cannot write %s: %s", self.path, error)
            self._disk_failed = True
            return False
        return True

    def _repair(self) -> None:
        """Cut off a last line without newline: the process that wrote it was killed in the middle."""
        with self.path.open("rb") as file:
            end = sum(len(line) for line in file if line.endswith(b"\n"))
            size = file.tell()
        if end < size:
            log.info("%s: cut off %d bytes of a record that was never finished", self.path, size - end)
            os.ftruncate(self._file, end)

    def _read_back(self, last_step: int) -> None:
        """Learn the run's uid and what is spooled beyond `last_step`."""
        uid = None
        for record in read_records(self.path):
            match record.kind:
                case "open":
                    uid = uid or record.payload["uid"]
                case "artifact":
                    self._artifacts.add(json.dumps(record.payload, sort_keys=True))
                case "metrics" | "image" if record.step is not None and record.step > last_step:
                    keys = record.payload.get("metrics")
                    names = {f"image {record.payload['key']}"} if keys is None else {f"metric {key}" for key in keys}
                    self._remember(record.step, names)
        self.uid = uid or self.uid

    def _remember(self, step: int, names: set[str]) -> None:
        # Most steps carry the same names: one shared set of them keeps a million steps small.
        merged = self._keys_at.get(step, frozenset()) | names
        self._keys_at[step] = self._key_sets.setdefault(merged, merged)

    def _relative(self, path: Path) -> str:
        absolute = Path(os.path.abspath(path))
        if absolute.is_relative_to(self._directory):
            return absolute.relative_to(self._directory).as_posix()
        return str(absolute)
