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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.storage.errors import OperationError
from data.storage.files import sha256_of
from trainer.checkpoint.part import PartFile

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_SEAL = "manifest_sha256"
_NAME = re.compile(r"step-(\d{8,18})", re.ASCII)
_PART_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


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

    def part(self, name: str) -> PartFile:
        """The part in the file of that name.

        Raises:
            UnreadableError: it cannot be read.
            CheckpointError: it is no part of a checkpoint.
        """
        file = self.path / name
        try:
            return PartFile(file)
        except OSError as error:
            raise UnreadableError(f"{file} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise CheckpointError(f"{file} is not a part of a checkpoint: {error}") from error

    def buffers(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The generator's buffers, by name.

        Args:
            wanted: tensors of the same names, shapes and dtypes.

        Raises:
            CheckpointError: the checkpoint has others.
        """
        saved = self.extras("buffers", 0)
        for name in wanted.keys() | saved.keys():
            mine, theirs = wanted.get(name), saved.get(name)
            if mine is None or theirs is None or (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
                raise CheckpointError(f"{self.path}: its buffer {name} is not that of these networks: others wrote it")
        return saved

    def extras(self, group: str, rank: int) -> dict[str, Tensor]:
        """The small tensors of `group` that `rank` saved in addition to its fragments."""
        prefix = f"extra/{group}/"
        return {k.removeprefix(prefix): t for k, t in self.all_extras(rank).items() if k.startswith(prefix)}

    def all_extras(self, rank: int) -> dict[str, Tensor]:
        """The small tensors of all groups of `rank`, by "extra/GROUP/NAME"."""
        part = self.part(self.file_of(rank))
        return {key: part.tensor(key) for key in part.keys if key.startswith("extra/")}


@dataclass
class Section:
    """Reads ranges of flattened parameters of one section, across the files of all ranks."""

    checkpoint: Checkpoint
    name: str
    _pieces: dict[str, list[PartFile]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file_name in self.checkpoint.manifest["files"]:
            part = self.checkpoint.part(file_name)
            for key in part.starts:
                if key.startswith(self.name + "/"):
                    self._pieces.setdefault(key, []).append(part)
        for key, parts in self._pieces.items():
            parts.sort(key=lambda part: part.starts[key])

    def lengths(self) -> dict[str, int]:
        """Number of elements of each flattened state, by its key in the files."""
        return {key: max(part.stop(key) for part in parts) for key, parts in self._pieces.items()}

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter `name`; see `engines.FragmentSource`."""
        key = f"{self.name}/{state}/{name}"
        ranges: list[tuple[PartFile, int, int]] = []
        position = start
        for part in self._pieces.get(key, ()):
            if part.starts[key] <= position < part.stop(key) and position < stop:
                until = min(part.stop(key), stop)
                ranges.append((part, position, until))
                position = until
        if position < stop:  # before memory is taken: a damaged header can name any length
            raise CheckpointError(
                f"{self.checkpoint.path} holds {position - start} of {stop - start} elements of {key}: a run "
                "with other networks wrote it"
            )
        out = torch.empty(stop - start)
        for part, first, last in ranges:
            out[first - start : last - start] = part.read(key, first, last)
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
        seal = manifest.pop(_SEAL, None) if isinstance(manifest, dict) else None
        is_sealed = seal is not None and seal == _seal(manifest)
    except RecursionError as error:
        raise ValueError("it is no JSON of a manifest") from error
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise ValueError("it has no format_version")
    version = manifest["format_version"]
    if version != FORMAT_VERSION:
        kind = NewerFormatError if isinstance(version, int) and version > FORMAT_VERSION else ValueError
        raise kind(f"format version {version!r:.50}, this program reads {FORMAT_VERSION}")
    if not is_sealed:
        raise ValueError("it is damaged: its SHA-256 differs from the one it states")
    missing = {"step", "world_size", "files", "config"} - manifest.keys()
    if missing:
        raise ValueError(f"no {sorted(missing)}")
    wrong = [key for key, fits in _FIELDS.items() if key in manifest and not fits(manifest[key])]
    if wrong:
        raise ValueError(f"its {wrong[0]} is {manifest[wrong[0]]!r:.100}, which no version of this program writes")
    if checkpoint_name(manifest["step"]) != name:
        raise ValueError(f"it is of step {manifest['step']}")
    strangers = [file for file in manifest["files"] if not _PART_NAME.fullmatch(file)]
    if strangers:
        raise ValueError(f"it names {strangers[0]!r:.100}, which is no file of its folder")
    if len(manifest["files"]) != manifest["world_size"]:
        raise ValueError(f"it names {len(manifest['files'])} parts of {manifest['world_size']} ranks")
    return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(number) is float or (type(number) is int and abs(number) < 2**63) for number in value.values()
    )


def _are_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and _is_count(entry.get("bytes")) and _is_text(entry.get("sha256"))
        for entry in value.values()
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "world_size": _is_count,
    "files": _are_files,
    "config": lambda value: isinstance(value, dict),
    "images": _is_count,
    "metrics": _are_numbers,
    "updates": _are_counts,
    "skipped_in_row": _are_counts,
    "zero_stages": _are_counts,
    "created": _is_text,
    "data": _is_text,
    "mlflow_run_id": lambda value: value is None or _is_text(value),
}
"""What readers rely on in a manifest whose own hash is right: another program can have written it."""


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
