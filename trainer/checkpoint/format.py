"""Sharded checkpoints, committed by a manifest. `python -m trainer.checkpoint` is the command for managing them.

    RUN/checkpoints/step-00000500/rank-00000-*.safetensors ...  the fragments that each rank owns (engines.Fragment)
    RUN/checkpoints/step-00000500/manifest.json                  written last, by rename: sizes, SHA-256, config, cursor

A folder without a valid manifest is not a checkpoint. Each group of ranks uses its own file names, so a group that is
wrongly believed dead cannot damage another group's checkpoint. The fragments of all ranks tile every parameter, so a
checkpoint is read by ranges of flattened parameters, independent of the number of ranks and the ZeRO stage that wrote
it. Loading executes no code: the data are safetensors, the manifest is JSON. `CheckpointWriter` writes checkpoints.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.storage.errors import OperationError
from data.storage.files import sha256_of

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_SEAL = "manifest_sha256"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(OperationError):
    """A checkpoint cannot be written or read; says which file and what to do."""


class UnreadableError(CheckpointError):
    """A checkpoint cannot be read at present, or not by this version; it may well be intact."""


class NewerFormatError(ValueError):
    """A newer version of the program wrote the manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest has been read.

    Attributes:
        path: its folder; in remote storage, the name of the checkpoint there until it is fetched.
        manifest: "step", "world_size", "files", "config", ... as written by `CheckpointWriter`.
    """

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps done when the checkpoint was written."""
        return self.manifest["step"]

    @property
    def num_bytes(self) -> int:
        """Total size of the parts of all ranks."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def verify(self) -> None:
        """Compare each file with the size and SHA-256 in the manifest.

        Raises:
            UnreadableError: a file cannot be read.
            CheckpointError: a file is missing or differs. Both name the first one.
        """
        self.check_sizes()
        for name, expected in self.manifest["files"].items():
            file = self.path / name
            try:
                found = sha256_of(file)
            except OSError as error:
                raise UnreadableError(f"{file} cannot be read: {error.strerror}") from error
            if found != expected["sha256"]:
                raise CheckpointError(f"{file} is damaged: its SHA-256 differs from its manifest's")

    def check_sizes(self) -> None:
        """Check that each file exists with the size in the manifest, without reading it.

        Raises:
            UnreadableError: a file cannot be looked at.
            CheckpointError: a file is missing or has another size. Both name the first one.
        """
        for name, expected in self.manifest["files"].items():
            file = self.path / name
            try:
                size = file.stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                raise CheckpointError(f"{file} is missing") from None
            except OSError as error:
                raise UnreadableError(f"{file} cannot be read: {error.strerror}") from error
            if size != expected["bytes"]:
                raise CheckpointError(f"{file} has {size} bytes, its manifest says {expected['bytes']}")

    def file_of(self, rank: int) -> str:
        """Name of the part of `rank`."""
        return sorted(self.manifest["files"])[rank]

    def section(self, section: str) -> "Section":
        """The state called `section`: "generator", "discriminator" or "ema"."""
        return Section(self, section)

    def extras(self, group: str, rank: int) -> dict[str, Tensor]:
        """The small tensors of `group` that `rank` saved in addition to its fragments."""
        prefix = f"extra/{group}/"
        return {k.removeprefix(prefix): t for k, t in self.all_extras(rank).items() if k.startswith(prefix)}

    def all_extras(self, rank: int) -> dict[str, Tensor]:
        """The small tensors of all groups of `rank`, by "extra/GROUP/NAME"."""
        with safe_open(self.path / self.file_of(rank), framework="pt") as f:
            return {key: f.get_tensor(key) for key in f.keys() if key.startswith("extra/")}  # noqa: SIM118


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
                opened = safe_open(file, framework="pt")  # maps the file; ranges are read on demand
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
            for key, start in (opened.metadata() or {}).items():
                if key.startswith(self.name + "/"):
                    self._pieces.setdefault(key, []).append((int(start), opened))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def lengths(self) -> dict[str, int]:
        """Number of elements of each flattened state, by its key in the files."""
        return {
            key: max(start + file.get_slice(key).get_shape()[0] for start, file in pieces)
            for key, pieces in self._pieces.items()
        }

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


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint folder of `step`."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The step in the name of a checkpoint folder."""
    return int(name.removeprefix("step-"))


def is_checkpoint_name(name: str) -> bool:
    """Whether this is the name of a checkpoint folder, complete or not."""
    return bool(_NAME.fullmatch(name))


def rank_file(rank: int, token: str = "") -> str:
    """Name of the part of `rank`; `token` distinguishes groups of ranks. Names sort in rank order."""
    return f"rank-{rank:05d}{f'-{token}' if token else ''}.safetensors"


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest, including its own hash: a flipped bit in a number can leave valid JSON."""
    return json.dumps({**manifest, _SEAL: _seal(manifest)}, indent=1).encode()


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse_manifest(content: bytes, name: str) -> dict[str, Any]:
    """Parse a manifest.

    Args:
        content: as from `encode_manifest`.
        name: name of the folder that contains it.

    Raises:
        NewerFormatError: it has a newer format version.
        ValueError: it is cut or altered, has another step, or lacks a field; says which.
    """
    try:
        manifest: Any = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is no JSON of a manifest") from error
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise ValueError("it has no format_version")
    version = manifest["format_version"]
    if version != FORMAT_VERSION:
        kind = NewerFormatError if isinstance(version, int) and version > FORMAT_VERSION else ValueError
        raise kind(f"format version {version}, this program reads {FORMAT_VERSION}")
    if manifest.pop(_SEAL, None) != _seal(manifest):
        raise ValueError("it is damaged: its SHA-256 differs from the one it states")
    missing = {"step", "world_size", "files", "config"} - manifest.keys()
    if missing:
        raise ValueError(f"no {sorted(missing)}")
    if checkpoint_name(manifest["step"]) != name:
        raise ValueError(f"it is of step {manifest['step']}")
    strangers = [file for file in manifest["files"] if Path(file).name != file or file in (".", "..")]
    if strangers:
        raise ValueError(f"it names {strangers[0]!r}, which is no file of its folder")
    return manifest


def folder_names(directory: Path) -> list[str]:
    """Names of all checkpoint folders in a directory, complete or not, sorted; none if it does not exist.

    Raises:
        OSError: the directory cannot be read, so its contents are unknown.
    """
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries if is_checkpoint_name(entry.name) and entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """Checkpoints with a readable manifest, oldest first. A folder without a manifest is skipped."""
    found: list[Checkpoint] = []
    for path in (directory / name for name in folder_names(directory)):
        try:
            found.append(Checkpoint(path, parse_manifest((path / MANIFEST).read_bytes(), path.name)))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            log.warning("passing over %s: its manifest cannot be read (%s)", path, error)
    return found


def newest_valid(directory: Path) -> Checkpoint | None:
    """The newest checkpoint of a local folder whose files all match their manifest; the others are logged."""
    for checkpoint in reversed(list_checkpoints(directory)):
        try:
            checkpoint.verify()
        except CheckpointError as error:
            log.warning("passing over checkpoint %s: %s", checkpoint.path.name, error)
        else:
            return checkpoint
    return None
