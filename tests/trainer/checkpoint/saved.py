"""Small checkpoints for tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.format import checkpoint_name
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.storage import CheckpointStorage, FolderStorage
from trainer.checkpoint.writer import CheckpointWriter
from trainer.engine.interface import Fragment
from trainer.engine.ranks import Ranks

KEEP_ALL = Retention(keep_last=1000)


def fragments(start: int = 0, stop: int = 10, scale: float = 1.0) -> list[Fragment]:
    return [Fragment("layer.weight", start, {"parameter": scale * torch.arange(start, stop, dtype=torch.float32)})]


def writer(place: Path | CheckpointStorage, ranks: Ranks, **more: Any) -> CheckpointWriter:
    storage = FolderStorage(place) if isinstance(place, Path) else place
    more.setdefault("pauses_s", (0.0, 0.0))
    return CheckpointWriter(storage, ranks, more.pop("retention", KEEP_ALL), **more)


def save(to: CheckpointWriter, step: int, manifest: Mapping[str, Any] | None = None) -> None:
    extras = {"statistics": {"loss": torch.tensor(float(step))}}
    content = {"config": {}, "images": 16 * step, **(manifest or {})}
    to.save(step, {"generator": fragments(scale=step)}, extras, content)


def write(place: Path | CheckpointStorage, ranks: Ranks, step: int, manifest: Mapping[str, Any] | None = None) -> Path:
    """A checkpoint of ten numbers and one sum."""
    to = writer(place, ranks)
    extras = {"statistics": {"loss": torch.tensor(float(step))}}
    to.save(step, {"generator": fragments()}, extras, {"config": {}, "images": 16 * step, **(manifest or {})})
    newest, error = to.finish()
    assert newest == step, error
    to.close()
    return place / checkpoint_name(step) if isinstance(place, Path) else Path(checkpoint_name(step))
