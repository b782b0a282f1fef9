"""Sharded checkpoints, committed by a manifest.

    RUN/checkpoints/step-00000500/rank-00000.safetensors ...   the fragments that each rank owns (see engines.Fragment)
    RUN/checkpoints/step-00000500/manifest.json                 written last, by rename: sizes, SHA-256, config, cursor

What lacks a valid manifest does not exist. The fragments of all ranks tile every parameter, so a checkpoint is read by
ranges of flattened parameters and does not care how many ranks or which ZeRO stage wrote it. Nothing in it is executed
on loading: the data are safetensors, the manifest is JSON.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.engines import Fragment
from trainer.ranks import Ranks

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; says which file and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest has been read.

    Attributes:
        path: its folder.
        manifest: "step", "world_size", "files", "config", ... as written by `save`.
    """

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when it was written."""
        return self.manifest["step"]

    def verify(self) -> None:
        """Compare each file with the size and SHA-256 in the manifest.

        Raises:
            CheckpointError: naming the first file that is missing or differs.
        """
        for name, expected in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{file} has {file.stat().st_size} bytes, its manifest says {expected['bytes']}")
            if _sha256(file) != expected["sha256"]:
                raise CheckpointError(f"{file} is damaged: its SHA-256 differs from its manifest's")

    def section(self, section: str) -> "Section":
        """The state called `section`: "generator", "discriminator" or "ema"."""
        return Section(self, section)

    def extras(self, group: str, rank: int) -> dict[str, Tensor]:
        """The small tensors of `group` that `rank` saved beside its fragments."""
        prefix = f"extra/{group}/"
        with safe_open(self.path / _rank_file(rank), framework="pt") as f:
            return {key.removeprefix(prefix): f.get_tensor(key) for key in f.keys() if key.startswith(prefix)}  # noqa: SIM118


@dataclass
class Section:
    """Reads ranges of flattened parameters of one section, across the files of all ranks."""

    checkpoint: Checkpoint
    name: str
    _pieces: dict[str, list[tuple[int, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file_name in self.checkpoint.manifest["files"]:
            file = self.checkpoint.path / file_name
            try:
                opened = safe_open(file, framework="pt")  # maps the file; a range is read when it is asked for
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
            for key, start in (opened.metadata() or {}).items():
                if key.startswith(self.name + "/"):
                    self._pieces.setdefault(key, []).append((int(start), opened))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter `name`; see `engines.FragmentSource`."""
        key = f"{self.name}/{state}/{name}"
        out = torch.empty(stop - start)
        position = start
        for first, file in self._pieces.get(key, ()):
            view = file.get_slice(key)
            last = first + view.get_shape()[0]
            if first <= position < last and position < stop:
                until = min(last, stop)
                out[position - start : until - start] = view[position - first : until - first]
                position = until
        if position < stop:
            raise CheckpointError(
                f"{self.checkpoint.path} holds {position - start} of {stop - start} elements of {key}: a run "
                "with other networks wrote it"
            )
        return out


def save(
    directory: Path,
    ranks: Ranks,
    step: int,
    sections: Mapping[str, Iterable[Fragment]],
    extras: Mapping[str, Mapping[str, Tensor]],
    manifest: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of `step`; a collective. It exists on return, or not at all.

    Args:
        directory: the run's folder of checkpoints, seen by every rank.
        ranks: this rank and the others.
        step: optimizer steps done.
        sections: fragments by section; all ranks together give each parameter once.
        extras: groups of small tensors of this rank.
        manifest: what rank 0 records beside step, world size and files.

    Raises:
        CheckpointError: on every rank if one of them could not write; the earlier checkpoints are untouched.
    """
    path = checkpoint_path(directory, step)
    error = ""
    if ranks.rank == 0:
        try:
            shutil.rmtree(path, ignore_errors=True)  # left by a save that was killed: without a manifest it is nothing
            path.mkdir(parents=True)
        except OSError as failure:
            error = f"{path}: {failure.strerror}"
    if error := ranks.broadcast(error):
        raise CheckpointError(f"cannot make the checkpoint's folder {error}")
    name, entry = _rank_file(ranks.rank), {}
    try:
        entry = _write_fragments(path / name, sections, extras)
    except (OSError, SafetensorError) as failure:
        error = f"rank {ranks.rank} cannot write {path / name}: {failure}"
    answers = ranks.gather((name, entry, error))
    errors = [e for _, _, e in answers if e]
    if not errors and ranks.rank == 0:
        files = {n: e for n, e, _ in answers}
        full = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": ranks.world_size,
            "files": files,
            **manifest,
        }
        try:
            _write_atomically(path / MANIFEST, json.dumps(full, indent=1).encode())
        except OSError as failure:
            errors = [f"rank 0 cannot write {path / MANIFEST}: {failure}"]
    errors = ranks.broadcast(errors)
    if errors:
        if ranks.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {step} was not saved: {'; '.join(errors)}")
    return path


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` is."""
    return directory / f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """Checkpoints with a readable manifest, oldest first. A folder without one is no checkpoint and is passed over."""
    found: list[Checkpoint] = []
    for path in sorted(directory.glob("step-*")):
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            if manifest["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {manifest['format_version']}, this program reads {FORMAT_VERSION}")
            missing = {"step", "world_size", "files", "config"} - manifest.keys()
            if missing:
                raise ValueError(f"no {sorted(missing)}")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("passing over %s: its manifest cannot be read (%s)", path, error)
            continue
        found.append(Checkpoint(path, manifest))
    return found


def newest_valid(directory: Path) -> Checkpoint | None:
    """The newest checkpoint whose files all match their manifest; the others are named in the log and passed over."""
    for checkpoint in reversed(list_checkpoints(directory)):
        try:
            checkpoint.verify()
        except CheckpointError as error:
            log.warning("passing over checkpoint %s: %s", checkpoint.path.name, error)
            continue
        return checkpoint
    return None


def prune(directory: Path, keep_last: int, step: int) -> None:
    """Delete what the checkpoint of `step`, just committed, makes superfluous.

    That is whatever lies beyond it, which failed its verification or the run would not stand here, all but the newest
    `keep_last` up to it, and folders of saves that never ended. Manifests go first, so that half of one is never
    believed.
    """
    found = {checkpoint.path: checkpoint.step for checkpoint in list_checkpoints(directory)}
    kept = sorted((path for path in found if found[path] <= step), key=lambda path: found[path])[-keep_last:]
    for path in directory.glob("step-*"):
        if path not in kept:
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _write_fragments(
    file: Path, sections: Mapping[str, Iterable[Fragment]], extras: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Any]:
    tensors = {
        f"extra/{group}/{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for group, tensors in extras.items()
        for name, tensor in tensors.items()
    }
    starts: dict[str, str] = {}
    for section, fragments in sections.items():
        for fragment in fragments:
            for state, tensor in fragment.tensors.items():
                key = f"{section}/{state}/{fragment.name}"
                tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()
                starts[key] = str(fragment.start)
    save_file(tensors, file, metadata=starts)
    _fsync(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _write_atomically(file: Path, content: bytes) -> None:
    partial = file.with_suffix(".tmp")
    partial.write_bytes(content)
    _fsync(partial)
    os.replace(partial, file)
    _fsync(file.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def timestamp() -> str:
    """Now, in UTC, for the manifest."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
