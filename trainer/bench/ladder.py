"""What makes a step faster, one thing after the other: the rows of the table of `trainer.bench gpu`."""

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from trainer.config.messages import fields_of
from trainer.config.train_config import TrainConfig


@dataclass(frozen=True)
class Rung:
    """One row: what it adds to the row before.

    Attributes:
        name: in words.
        settings: by dotted name, the values that mean it; of those that the setting's type has, the first is taken.
    """

    name: str
    settings: dict[str, tuple[Any, ...]]


OFF = (False, "off", "none")
LADDER = (
    Rung(
        "eager fp32",
        {
            "training.precision": ("fp32",),
            "engine.fused": OFF,
            "engine.compile": OFF,
            "engine.cuda_graphs": OFF,
        },
    ),
    Rung("eager tf32", {"training.precision": ("tf32",)}),
    Rung("bf16", {"training.precision": ("bf16",)}),
    Rung("+ fused operators", {"engine.fused": (True, "on")}),
    Rung("+ compiled", {"engine.compile": (True, "on")}),
    Rung("+ CUDA graphs", {"engine.cuda_graphs": (True, "on")}),
)
"""The first row sets what exists; each other row needs at least one setting that exists, with a value that means it."""


def allowed(name: str, value: Any) -> bool:
    """Whether a setting exists and its type has the value; of numbers, only whether the setting exists."""
    annotation: Any = TrainConfig
    for part in name.split("."):
        if not isinstance(annotation, type) or part not in (fields := fields_of(annotation)):
            return False
        annotation = fields[part]
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    return annotation is not bool or isinstance(value, bool)


def rungs() -> list[tuple[str, list[str] | None]]:
    """Each row's name and all of its overrides; None for a row whose settings do not exist in this version."""
    found: list[tuple[str, list[str] | None]] = []
    chosen: dict[str, str] = {}
    for rung in LADDER:
        added = {
            name: str(value).lower()
            for name, values in rung.settings.items()
            for value in [next((value for value in values if allowed(name, value)), None)]
            if value is not None
        }
        chosen |= added
        found.append((rung.name, [f"{name}={value}" for name, value in chosen.items()] if added else None))
    return found
