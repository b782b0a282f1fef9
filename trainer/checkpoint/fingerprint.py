"""Hashes of a checkpoint's contents. Those of the networks do not depend on the number of ranks."""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from trainer.checkpoint.format import Checkpoint
from trainer.checkpoint.part import PartFile

_MEASURED = ("time/", "images_per_s", "peak_memory", "checkpoint")
"""Prefixes of curves that describe the machine, not the run."""


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 hashes in hex.

    Attributes:
        weights: parameters of both networks, and the generator's fixed buffers.
        ema: the averaged generator.
        optimizer: Adam's moments of both.
        metrics: each rank's sums of statistics not yet in the curves, and the last point of the curves.
    """

    weights: str
    ema: str
    optimizer: str
    metrics: str

    def differing(self, other: "Fingerprint") -> list[str]:
        """Names of the parts that differ."""
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]


@dataclass(frozen=True, order=True)
class _Piece:
    """One tensor of one file; sorts in the order of hashing."""

    key: str
    start: int
    file: int


def fingerprint(checkpoint: Checkpoint) -> Fingerprint:
    """Hash the whole checkpoint.

    Raises:
        CheckpointError: it does not match its manifest.
    """
    checkpoint.verify()
    files = [checkpoint.part(name) for name in sorted(checkpoint.manifest["files"])]
    hashes = {field.name: hashlib.sha256() for field in fields(Fingerprint)}
    for piece in sorted(_pieces(files)):
        part = hashes[_part_of(piece.key)]
        tensor = files[piece.file].tensor(piece.key)
        if piece.start == 0:  # later fragments continue the same parameter, wherever the ranks split it
            part.update(f"\n{piece.key}\n".encode())
        part.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    point = checkpoint.manifest.get("metrics") or {}
    hashes["metrics"].update(json.dumps(_of_the_run(point), sort_keys=True).encode())
    return Fingerprint(**{name: part.hexdigest() for name, part in hashes.items()})


def _pieces(files: list[PartFile]) -> Iterator[_Piece]:
    for number, file in enumerate(files):
        for key in file.keys:
            # Each rank has its own small tensors, but the networks' buffers are the same on all ranks.
            if not key.startswith("extra/buffers/") or number == 0:
                yield _Piece(key, file.starts.get(key, 0), number)


def _part_of(key: str) -> str:
    section, kind, _ = key.split("/", 2)
    if section == "extra":
        return "weights" if kind == "buffers" else "metrics"
    if section == "ema":
        return "ema"
    return "weights" if kind == "parameter" else "optimizer"


def _of_the_run(metrics: dict[str, float]) -> dict[str, str]:
    """Values by their bits: only equal numbers compare equal, however they are printed."""
    kept = {name: value for name, value in metrics.items() if not name.startswith(_MEASURED)}
    return {name: struct.pack("<d", value).hex() for name, value in kept.items()}
