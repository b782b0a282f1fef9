"""What is known of one run, read from its directory alone."""

import base64
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from data.shards.index import load_index
from data.storage.errors import UserError
from data.storage.location import DataError
from data.storage.redaction import redact, redact_values
from trainer.checkpoint.lease import Holder, is_alive
from trainer.checkpoint.lease_places import LEASE
from trainer.config.strict_yaml import parse
from trainer.report.curves import Points
from trainer.report.hours import Hours, read_hours
from trainer.tracking.spool import RunRecords, read_curves, spool_path

MAX_GRIDS, MAX_GRID_SIDE = 24, 1024
"""Grids of a run, evenly chosen, and their largest side in pixels."""
_SMALL_BYTES = 200_000
"""A larger grid becomes a JPEG."""


class ReportError(UserError):
    """What is named is no run, or the report cannot be written."""


@dataclass(frozen=True)
class Grid:
    """Samples after a step, as a data: URL."""

    step: int
    url: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run.

    Attributes:
        name: of its directory, and of more of its path where two are alike.
        state: what became of it, in words.
        config: scalars of its config, by dotted name.
        config_text: the config, as the run wrote it.
        curves: step and finite value of each point of each curve.
        grids: its grids of samples.
        num_grids: how many it has drawn.
        hours: where its time went; None: it has no event log.
        tags: commit and versions.
        data: what is known of its data set, by name.
        missing: what the report lacks, and why.
    """

    name: str
    state: str
    config: dict[str, Any]
    config_text: str
    curves: Mapping[str, Points]
    grids: tuple[Grid, ...]
    num_grids: int
    hours: Hours | None
    tags: dict[str, str]
    data: dict[str, str]
    missing: tuple[str, ...]


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs, in the order in which they are given.

    Raises:
        ReportError: a directory is that of no run, or is given twice.
    """
    resolved = [directory.resolve() for directory in directories]
    for number, directory in enumerate(resolved):
        if directory in resolved[:number]:
            raise ReportError(f"{directories[number]} is given twice: give each run once")
        if not directory.is_dir():
            what = "is a file" if directory.exists() else "does not exist"
            raise ReportError(f"{directories[number]} {what}: give the directory of a run, its run.directory")
        if not (directory / "config.yaml").is_file():
            raise ReportError(
                f"{directories[number]} is the folder of no run, as it holds no config.yaml: give a run.directory"
            )
    return [_read(directory, name) for directory, name in zip(resolved, _names(resolved), strict=True)]


def _names(directories: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for length in itertools.count(1):
        names = ["/".join(directory.parts[-length:]) for directory in directories]
        if len(set(names)) == len(names):
            return names
    raise AssertionError


def _read(directory: Path, name: str) -> Run:
    text = redact((directory / "config.yaml").read_text(encoding="utf-8", errors="replace"))
    config = redact_values(dict(_flat(parse(text).value, "")))
    running = is_running(directory)
    hours, curves, missing = read_hours(directory, running=bool(running)), _curves(directory), list[str]()
    if not config:
        missing.append("Settings: config.yaml cannot be read as a config.")
    if hours is None:
        missing.append(
            "Where the hours went: there is no event log in the folder events, so an earlier version made this run."
        )
    if not curves:
        backends = config.get("tracking.backends")
        why = "tracking.backends is empty" if backends == "[]" else "there is no spool in the folder tracking"
        missing.append(f"Curves: {why}. They are read from the spool, which each tracker is fed from.")
    files = sorted((directory / "samples").glob("step-*.png"))
    if not files:
        missing.append("Grids of samples: there are none in the folder samples.")
    return Run(
        name=name,
        state=_state(hours, running),
        config=config,
        config_text=text,
        curves=curves,
        grids=tuple(_grids(files)),
        num_grids=len(files),
        hours=hours,
        tags=_tags(directory, hours),
        data=_data(config),
        missing=tuple(missing),
    )


def _curves(directory: Path) -> dict[str, Points]:
    finite = (
        (name, [(step, value) for step, value in points if math.isfinite(value)])
        for name, points in read_curves(directory).items()
    )
    return {name: points for name, points in finite if points}


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, str(value) if isinstance(value, list | dict) else value


def is_running(directory: Path) -> bool | None:
    """Whether a process of this host trains in a run directory; None if one of another host does, or did at its end."""
    try:
        holder = Holder.decode((directory / LEASE).read_bytes())
    except OSError:
        return False
    return is_alive(holder.process) if holder else False


def _state(hours: Hours | None, running: bool | None) -> str:
    if running:
        return "still running: this is what it has recorded so far"
    if hours is None:
        return "unknown, for want of an event log"
    last = hours.starts[-1]
    if last.status == "FINISHED":
        return f"finished at step {last.last_step}"
    if last.status == "KILLED":
        return f"stopped on request at step {last.last_step}; the same command resumes it"
    if last.status is not None:
        return f"failed after step {last.last_step}"
    if running is None:
        return "its lease is that of another host: it still runs there, or was killed"
    return f"killed after step {last.last_step}; the same command resumes it"


def _tags(directory: Path, hours: Hours | None) -> dict[str, str]:
    """Commit and versions, from the last start; from the spool, if the run has no event log."""
    tags: Any = hours.starts[-1].facts.get("tags") if hours else None
    if not isinstance(tags, dict):
        try:
            newest = RunRecords(spool_path(directory)).newest
        except (OSError, ValueError):
            newest = None
        tags = newest.payload.get("tags", {}) if newest else {}
    return {str(name): str(value) for name, value in tags.items()}


def _data(config: Mapping[str, Any]) -> dict[str, str]:
    location = str(config.get("data.path", "unknown"))
    found = {"path": location}
    try:
        index = load_index(location)
    except (DataError, OSError):
        return found | {"data set": "not readable from here; the config has what the run was told of it"}
    size, given = index.image_size, index.condition_channels
    found |= {
        "data set": index.source,
        "images": f"{index.num_samples:,} of {size} x {size} x {index.image_channels}",
        **({"given with each": f"{size} x {size} x {given}"} if given else {}),
        "shards": f"{len(index.shards):,}",
        "SHA-256 of its index": index.digest,
    }
    if index.num_classes:
        found["classes"] = str(index.num_classes)
    seen = config.get("training.total_images")
    if isinstance(seen, int):
        found["epochs planned"] = f"{seen / index.num_samples:,.1f}"
    return found


def _grids(files: Sequence[Path]) -> Iterator[Grid]:
    chosen = files
    if len(files) > MAX_GRIDS:
        chosen = [files[i * (len(files) - 1) // (MAX_GRIDS - 1)] for i in range(MAX_GRIDS)]
    for file in chosen:
        step = file.stem.removeprefix("step-")
        try:
            url = _data_url(file)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            continue  # it is being written, or was damaged
        if step.isascii() and step.isdigit():
            yield Grid(int(step), url)


def _data_url(file: Path) -> str:
    content, kind = file.read_bytes(), "png"
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        if max(picture.size) > MAX_GRID_SIDE or len(content) > _SMALL_BYTES:
            smaller = picture.convert("RGB")
            smaller.thumbnail((MAX_GRID_SIDE, MAX_GRID_SIDE))
            buffer = io.BytesIO()
            smaller.save(buffer, "JPEG", quality=90)
            content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
