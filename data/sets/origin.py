"""origin.json, next to index.json: what a data set was made from. Only `inspect` and a repeated preparation need it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from data.storage.files import write_json

ORIGIN_NAME = "origin.json"


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True)
class Origin:
    """Content of origin.json."""

    format: Literal["ddgan-origin"] = "ddgan-origin"
    """Identifies the file format."""
    version: Literal[1] = 1
    """Version of the format."""
    state: str
    """The source's `state` when its images were listed."""
    content: str
    """Hash of the images."""
    sides: dict[str, int] = field(default_factory=dict)
    """Images by the short side of the original in pixels; empty in earlier data sets."""

    def save(self, folder: Path) -> None:
        """Write it to the folder of a data set."""
        write_json(folder / ORIGIN_NAME, asdict(self))


_ORIGIN = TypeAdapter(Origin)


def load_origin(folder: Path) -> Origin | None:
    """Read it from the folder of a data set; None if it is missing or damaged."""
    try:
        return _ORIGIN.validate_json((folder / ORIGIN_NAME).read_bytes())
    except (OSError, ValidationError):
        return None


def original_sides(folder: Path) -> dict[int, int]:
    """Images by the short side of the original in pixels, in ascending order; empty if that was not recorded."""
    origin = load_origin(folder)
    sides = {} if origin is None else origin.sides
    return {int(side): sides[side] for side in sorted(sides, key=int) if sides[side] > 0} if _are_numbers(sides) else {}


def _are_numbers(sides: dict[str, int]) -> bool:
    return all(side.isascii() and side.isdigit() and len(side) < 10 and int(side) > 0 for side in sides)
