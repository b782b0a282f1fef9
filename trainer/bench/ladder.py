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
        nchw: in the layout that torch starts from, instead of channels_last.
    """

    name: str
    settings: dict[str, tuple[Any, ...]]
    nchw: bool = False


@dataclass(frozen=True)
class Row:
    """A row as it is measured.

    Attributes:
        name: in words.
        overrides: all of its settings; None if this version has none of those that it adds.
        nchw: as in `Rung`.
    """

    name: str
    overrides: list[str] | None
    nchw: bool = False


OFF = (False, "off", "none")
LADDER = (
    Rung(
        "eager NCHW fp32",
        {
            "training.precision": ("fp32",),
            "engine.fused": OFF,
            "engine.compile": OFF,
            "engine.cuda_graphs": OFF,
        },
        nchw=True,
    ),
    Rung("eager NCHW tf32", {"training.precision": ("tf32",)}, nchw=True),
    Rung("bf16 channels_last", {"training.precision": ("bf16",)}),
    Rung("+ fused operators", {"engine.fused": (True, "on")}),
    Rung("+ compiled", {"engine.compile": (True, "on")}),
    Rung(
        "+ plain engine",
        {"engine.backend": ("torch",), "engine.zero_stage_g": (0,), "engine.zero_stage_d": (0,)},
    ),
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


def rows() -> list[Row]:
    """The rows, each with its own settings and those of the rows before it."""
    found: list[Row] = []
    chosen: dict[str, str] = {}
    for rung in LADDER:
        added = {
            name: str(value).lower()
            for name, values in rung.settings.items()
            for value in [next((value for value in values if allowed(name, value)), None)]
            if value is not None
        }
        chosen |= added
        overrides = [f"{name}={value}" for name, value in chosen.items()] if added else None
        found.append(Row(rung.name, overrides, rung.nchw))
    return found
