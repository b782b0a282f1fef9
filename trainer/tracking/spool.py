"""The records of a run for its trackers, first stored in a local, append-only file of JSON lines.

Training only appends to `<run directory>/tracking/spool.jsonl`. Each tracker has an uploader, in another process, which
reads the file and records how far this tracker has received it: for MLflow in `tracking/mlflow/delivered.json`.

    {"kind": "open", "at": 1700000000000, "step": 100, "uid": ..., "params": {...}, "tags": {...}, ...}
    {"kind": "metrics", "at": ..., "step": 150, "metrics": {"loss_g": 0.7}}
    {"kind": "image", "at": ..., "step": 150, "key": "samples", "path": "samples/000150.png"}
    {"kind": "artifact", "at": ..., "step": null, "path": "snapshots/final.safetensors", "folder": "snapshots", ...}
    {"kind": "close", "at": ..., "step": null, "status": "FINISHED"}

An open record with another uid than those before it begins a new run on the server. It takes over what came before, up
to its step; see `RunRecords`.
"""

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from data.storage.files import read_note, replaced, set_aside

log = logging.getLogger(__name__)

Kind = Literal["open", "metrics", "image", "artifact", "close"]
Status = Literal["FINISHED", "KILLED", "FAILED"]
OPENING = ("run_name", "backends", "experiment", "uri", "uri_source", "uri_given", "params", "tags")
"""What an open record says of its run, in addition to its ids."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the spool."""

    kind: Kind
    """Kind of record."""
    at: int
    """Wall-clock time of the append, in ms since 1970; the server shows it as the point's time."""
    step: int | None
    """Optimizer step, if the record belongs to one."""
    payload: dict[str, Any]
    """The other fields of the line, by kind."""
    start: int
    """Byte offset of the line."""
    end: int
    """Byte offset after its newline."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How much of the spool one tracker has received."""

    target: str = ""
    """Where it is: a server's URI without its password. A different place starts at offset 0."""
    uid: str | None = None
    """The run's own id, as in its open records."""
    run_id: str | None = None
    """The server's id of the run."""
    offset: int = 0
    """All records before this byte have been received."""
    refused: int = 0
    """Number of skipped records: the server rejected them as invalid, or their file is gone."""
    trouble: str | None = None
    """Why the last attempt failed; None if it succeeded."""
    waiting: tuple[int, ...] = ()
    """Offsets of images and artifacts before `offset` that the server could not store yet."""
    files_trouble: str | None = None
    """Why they could not be stored."""

    @property
    def problem(self) -> str | None:
        """What keeps records from the server, for a message."""
        return self.trouble or (self.files_trouble and f"it takes curves, but no files: {self.files_trouble}")


def spool_path(run_directory: Path) -> Path:
    """The spool file of a run."""
    return run_directory / "tracking" / "spool.jsonl"


def uploader_folder(run_directory: Path, backend: str) -> Path:
    """The folder of the uploader to one tracker: its progress, its log and its lock."""
    return run_directory / "tracking" / backend


def progress_path(run_directory: Path, backend: str) -> Path:
    """The file with the progress of the upload to one tracker."""
    return uploader_folder(run_directory, backend) / "delivered.json"


def load_progress(run_directory: Path, backend: str, target: str, uid: str | None = None) -> Progress:
    """Progress of the run `uid` at the tracker at `target`; the start if none is recorded or it cannot be read."""
    noted = read_note(progress_path(run_directory, backend), _parse_progress)
    if noted is None or noted.target != target or (uid and noted.uid not in (None, uid)):
        return Progress(target=target, uid=uid)
    return replace(noted, uid=uid or noted.uid)


def _parse_progress(content: bytes) -> Progress:
    noted = Progress(**json.loads(content))
    noted = replace(noted, waiting=tuple(noted.waiting))
    texts = (noted.target, *(text or "" for text in (noted.uid, noted.run_id, noted.trouble, noted.files_trouble)))
    numbers = (noted.offset, noted.refused, *noted.waiting)
    if not all(isinstance(text, str) for text in texts) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("its values have wrong types")
    return noted


def save_progress(run_directory: Path, backend: str, progress: Progress) -> None:
    """Save the progress atomically, by rename: a reader sees the old or the new version."""
    path = progress_path(run_directory, backend)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as draft:
        draft.write_text(json.dumps(asdict(progress)))


def read_records(path: Path, offset: int = 0) -> Iterator[Record]:
    """Complete records from byte `offset` on; an incomplete last line is ignored, as it is still being written.

    A line that is not a record is skipped: only a full disk or manual editing can cause one.
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
                if not _is_count(at) or not (step is None or _is_count(step)) or not _is_payload(kind, fields):
                    raise ValueError("its values have wrong types")
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                log.warning("%s: the line at byte %d is no record, passed over", path, start)
                continue
            yield Record(kind=kind, at=at, step=step, payload=fields, start=start, end=offset)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_payload(kind: Any, fields: Mapping[str, Any]) -> bool:
    """Whether these are the fields of a record of that kind, with the types that the readers rely on."""
    match kind:
        case "open":
            optional = [fields[name] for name in ("run_id", "uri_given") if fields.get(name) is not None]
            named = (fields.get(name, "") for name in ("run_name", "experiment", "uri", "uri_source"))
            texts = [fields["uid"], *optional, *named, *backends_of(fields)]
            mappings = (fields.get("params", {}), fields.get("tags", {}))
            return all(isinstance(text, str) for text in (*texts, *(v for m in mappings for v in m.values())))
        case "metrics":
            values = fields["metrics"].values()
            return all(type(value) is float or (type(value) is int and abs(value) < 2**63) for value in values)
        case "image":
            return isinstance(fields["key"], str) and isinstance(fields["path"], str)
        case "artifact":
            texts = (fields["path"], fields["folder"] or "", fields.get("register_as", ""))
            return all(isinstance(text, str) for text in texts)
        case "close":
            return fields["status"] in get_args(Status)
        case _:
            return False


def backends_of(opening: Mapping[str, Any]) -> tuple[str, ...]:
    """The trackers of a run, from the payload of an open record; MLflow where none are named."""
    return tuple(opening.get("backends", ("mlflow",)))


def last_close(path: Path, before: int) -> int:
    """Offset after the last close record before the byte `before`; 0 without one."""
    ends = (record.end for record in read_records(path) if record.kind == "close" and record.end <= before)
    return max(ends, default=0)


class RunRecords:
    """The records of a spool that belong to its newest run on the server.

    A spool may hold several runs one after the other: a copied directory, or a start with other settings, begins a new
    one. A run owns all records from its first open record on. Of those before, it owns points, images and artifacts up
    to the step at which it began; nothing, if it began without a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        """Read the open records.

        Raises:
            ValueError: the spool has none.
            OSError: it cannot be read.
        """
        self._begins: list[Record] = []
        self.newest: Record | None = None
        for record in read_records(path):
            if record.kind == "open":
                if self.newest is None or record.payload["uid"] != self.newest.payload["uid"]:
                    self._begins.append(record)
                self.newest = record
        if not self._begins:
            raise ValueError(f"{path} does not begin with an open record")
        self.opening = self._begins[-1]
        self.uid: str = self.opening.payload["uid"]

    def own(self, record: Record) -> bool:
        """Whether a record belongs to the newest run."""
        for later in self._begins:
            if later.start <= record.start:
                continue
            if later.step is None or record.kind in ("open", "close"):
                return False
            if record.step is not None and record.step > later.step:
                return False
        return True

    def begins_another(self, record: Record) -> bool:
        """Whether a record, written since, begins another run."""
        return record.kind == "open" and record.start > self.opening.start and record.payload["uid"] != self.uid


def read_curves(run_directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each point of each curve of the newest run, by step; empty for a run that was not tracked.

    Of the points that a curve has at one step, the first counts, as on the server.
    """
    path = spool_path(run_directory)
    curves: dict[str, dict[int, float]] = {}
    try:
        own = RunRecords(path).own
        for record in read_records(path):
            if record.kind == "metrics" and record.step is not None and own(record):
                for name, value in record.payload["metrics"].items():
                    curves.setdefault(name, {}).setdefault(record.step, value)
    except (OSError, ValueError):
        return {}
    return {name: sorted(points.items()) for name, points in curves.items()}


def count_left(path: Path, noted: Progress) -> int:
    """Number of records that a tracker does not have yet."""
    try:
        own = RunRecords(path).own
        return sum(own(record) for record in read_records(path, noted.offset)) + len(noted.waiting)
    except (OSError, ValueError):
        return 0


def is_closed(path: Path) -> bool:
    """Whether the last record is a close. Reads only the end of the file, since this is called every second."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 512))
        lines = file.read().splitlines(keepends=True)
    try:
        return lines[-1].endswith(b"\n") and json.loads(lines[-1])["kind"] == "close"
    except (IndexError, KeyError, TypeError, ValueError):
        return False


class Spool:
    """The writing end. If the disk does not accept a record, it logs this once and never raises."""

    def __init__(self, run_directory: Path, *, last_step: int | None = None, clock_ms: Callable[[], int] | None = None):
        """Open the spool of a run and repair it.

        Args:
            run_directory: folder of the run.
            last_step: step of the checkpoint that the run resumes from. Steps up to it are already in the spool and
                cannot come again; later ones may also be in it, from before the run was killed.
            clock_ms: wall clock in ms, for tests.

        Raises:
            OSError: the folder or the file cannot be written.
        """
        self.path = spool_path(run_directory)
        self.former: Record | None = None
        self.uid = uuid.uuid4().hex
        self._directory = Path(os.path.abspath(run_directory))
        self._clock_ms = clock_ms or (lambda: time.time_ns() // 1_000_000)
        self._keys_at: dict[int, frozenset[str]] = {}
        self._key_sets: dict[frozenset[str], frozenset[str]] = {}
        self._artifacts: set[str] = set()
        self._disk_failed = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = self._opened()
        except (PermissionError, IsADirectoryError) as error:
            log.warning("%s cannot be used and is set aside: %s", self.path, error)
            set_aside(self.path)
            self._file = self._opened()
        self._repair()
        self._read_back(-1 if last_step is None else last_step)

    @property
    def is_ahead(self) -> bool:
        """Whether the run has reported steps that come again, after the checkpoint that it resumes from."""
        return bool(self._keys_at)

    def begin_new_run(self) -> None:
        """Let the next `open` begin a new run on the server; see `RunRecords`."""
        self.uid = uuid.uuid4().hex
        self._keys_at.clear()
        self._artifacts.clear()

    def open(self, *, step: int | None, **payload: Any) -> None:
        """Record that a process starts or resumes the run."""
        self._append("open", step, {"uid": self.uid, **payload})

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one point of each curve, unless the curve already has a point at this step."""
        seen = self._keys_at.get(step, frozenset())
        fresh = {key: float(value) for key, value in metrics.items() if f"metric {key}" not in seen}
        if fresh and self._append("metrics", step, {"metrics": fresh}):
            self._remember(step, {f"metric {key}" for key in fresh})

    def image(self, step: int, key: str, path: Path) -> None:
        """Append an image file of the run, unless there is already one at this step."""
        if f"image {key}" in self._keys_at.get(step, frozenset()):
            return
        if self._append("image", step, {"key": key, "path": self._relative(path)}):
            self._remember(step, {f"image {key}"})

    def artifact(self, path: Path, folder: str | None, register_as: str | None = None) -> None:
        """Append a file of the run, unless the spool has it (same size and modification time)."""
        try:
            state = path.stat()
        except OSError as error:
            log.warning("no artifact: %s", error)
            return
        payload: dict[str, Any] = {"path": self._relative(path), "folder": folder}
        payload |= {"stamp": [state.st_size, state.st_mtime_ns]} | ({"register_as": register_as} if register_as else {})
        name = json.dumps(payload, sort_keys=True)
        if name not in self._artifacts and self._append("artifact", None, payload):
            self._artifacts.add(name)

    def close(self, status: Status) -> None:
        """Append the end of this process's part of the run, and close the file."""
        self._append("close", None, {"status": status})
        os.close(self._file)

    def _append(self, kind: Kind, step: int | None, payload: Mapping[str, Any]) -> bool:
        line = json.dumps({"kind": kind, "at": self._clock_ms(), "step": step, **payload}).encode() + b"\n"
        # Not synced here: the uploader syncs the file before reading it, so that no step waits for a disk.
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

    def _opened(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def _repair(self) -> None:
        """Cut off a last line without a newline: its writer was killed in the middle of it."""
        with self.path.open("rb") as file:
            end = sum(len(line) for line in file if line.endswith(b"\n"))
            size = file.tell()
        if end < size:
            log.info("%s: cut off %d bytes of a record that was never finished", self.path, size - end)
            os.ftruncate(self._file, end)

    def _read_back(self, last_step: int) -> None:
        """Read the newest open record, and which of the run's points, images and artifacts are in the spool."""
        try:
            run = RunRecords(self.path)
        except ValueError:
            return
        self.former, self.uid = run.newest, run.uid
        for record in filter(run.own, read_records(self.path)):
            match record.kind:
                case "artifact":
                    self._artifacts.add(json.dumps(record.payload, sort_keys=True))
                case "metrics" | "image" if record.step is not None and record.step > last_step:
                    keys = record.payload.get("metrics")
                    names = {f"image {record.payload['key']}"} if keys is None else {f"metric {key}" for key in keys}
                    self._remember(record.step, names)

    def _remember(self, step: int, names: set[str]) -> None:
        # Most steps have the same names: sharing one set keeps a million steps small.
        merged = self._keys_at.get(step, frozenset()) | names
        self._keys_at[step] = self._key_sets.setdefault(merged, merged)

    def _relative(self, path: Path) -> str:
        absolute = Path(os.path.abspath(path))
        if absolute.is_relative_to(self._directory):
            return absolute.relative_to(self._directory).as_posix()
        return str(absolute)
