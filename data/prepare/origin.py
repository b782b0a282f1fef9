"""What a data set was made from: whether its source is still the same, by times of files, else by content.

The names and sizes in index.json do not tell two folders of equal names and sizes apart.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from rich.console import Console

from data.prepare.job import Preparation
from data.processes.pool import map_in_order
from data.sets.terminal import progress_bar
from data.sets.work_folder import OutputError
from data.sources.source import HASH_BYTES, Item, Source, hash_of
from data.storage.files import write_json

ORIGIN_NAME = "origin.json"
_CHUNK_ITEMS = 32


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True)
class Origin:
    """Content of origin.json, next to index.json. Only a repeated preparation needs it."""

    format: Literal["ddgan-origin"] = "ddgan-origin"
    """Identifies the file format."""
    version: Literal[1] = 1
    """Version of the format."""
    state: str
    """The source's `state` when its images were listed."""
    content: str
    """Hash of the images, see `content_of`."""

    def save(self, folder: Path) -> None:
        """Write it to the folder of a data set."""
        write_json(folder / ORIGIN_NAME, asdict(self))


_ORIGIN = TypeAdapter(Origin)


def content_of(hashes: Iterable[int]) -> str:
    """A hash of some images from the hash of each. It does not depend on their order."""
    return f"{sum(hashes) % 2 ** (8 * HASH_BYTES):0{2 * HASH_BYTES}x}"


def read_content(source: Source, items: Sequence[Item], workers: int, console: Console) -> str:
    """`content_of` for images as they are now; reads all of them."""
    chunks = [items[place : place + _CHUNK_ITEMS] for place in range(0, len(items), _CHUNK_ITEMS)]
    hashes: list[int] = []
    with progress_bar(console) as progress:
        task = progress.add_task("comparing images", total=len(items))
        with contextlib.closing(map_in_order(partial(_hash_items, source), chunks, workers)) as results:
            for some in results:
                hashes += some
                progress.advance(task, len(some))
    return content_of(hashes)


def _hash_items(source: Source, items: Sequence[Item]) -> list[int]:
    hashes: list[int] = []
    for item in items:
        content = b""
        with contextlib.suppress(OSError):
            content = source.read(item) + source.read_condition(item)
        hashes.append(hash_of(item, content))
    return hashes


def refuse_other_origin(job: Preparation, console: Console) -> None:
    """Check that a prepared data set was made from these images.

    Args:
        job: its target is a prepared data set of the same description, names, sizes and options.
        console: shows progress if the images must be read.

    Raises:
        OutputError: it was made from others.
    """
    try:
        origin = _ORIGIN.validate_json((job.target / ORIGIN_NAME).read_bytes())
    # Earlier data sets have none.
    except (OSError, ValidationError):
        return
    if origin.state == job.source.state:
        return
    if origin.content != read_content(job.source, job.source.items, job.options.workers, console):
        raise OutputError(
            f"--out {job.target} holds a data set of other images: their names and sizes are the same, their content "
            "is not; choose another --out, or remove it yourself"
        )
