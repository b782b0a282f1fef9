"""origin.json, next to index.json: what a data set was made from. Only `inspect` and a repeated preparation need it."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter, ValidationError, with_config

from data.storage.files import write_json
from data.storage.location import DataError, is_remote, local_path
from data.storage.remote_folder import RemoteFolder

ORIGIN_NAME = "origin.json"
_Pixels = Annotated[str, Field(pattern=r"^[1-9]\d{0,8}$")]


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
    sides: dict[_Pixels, PositiveInt] = field(default_factory=dict)
    """Images by the short side of the original in pixels; empty in earlier data sets."""

    @property
    def num_images(self) -> int:
        """Images whose originals were measured."""
        return sum(self.sides.values())

    def is_of_the_images_of(self, other: "Origin | None") -> bool:
        """Whether both are of the same images; the `state` of a source depends on where it lies."""
        return other is not None and (other.content, other.sides) == (self.content, self.sides)

    def save(self, folder: Path) -> None:
        """Write it to the folder of a data set."""
        write_json(folder / ORIGIN_NAME, asdict(self))


_ORIGIN = TypeAdapter(Origin)


def parse_origin(content: bytes | None) -> Origin | None:
    """What the bytes of an origin.json say; None if there are none, or they are damaged."""
    try:
        return None if content is None else _ORIGIN.validate_json(content)
    except ValidationError:
        return None


def load_origin(folder: Path) -> Origin | None:
    """Read it from the folder of a data set; None if it is missing or damaged."""
    try:
        return parse_origin((folder / ORIGIN_NAME).read_bytes())
    except OSError:
        return None


def original_sides(location: str) -> dict[int, int]:
    """Images by the short side of the original in pixels, in ascending order; empty if that cannot be known.

    Args:
        location: folder or URL of a data set.
    """
    origin = _read_remote(location) if is_remote(location) else load_origin(local_path(location))
    sides = {} if origin is None else origin.sides
    return {int(side): sides[side] for side in sorted(sides, key=int)}


def _read_remote(url: str) -> Origin | None:
    try:
        return parse_origin(RemoteFolder(url).content(ORIGIN_NAME))
    except DataError:  # some storage refuses access to files that are not there
        return None
