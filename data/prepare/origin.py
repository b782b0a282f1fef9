"""What a data set was made from: whether its source is still the same, by times of files, else by content.

The names and sizes in index.json do not tell two folders of equal names and sizes apart.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from rich.console import Console

from data.prepare.filters import MapInOrder, Removed, apply_filters
from data.prepare.job import Preparation
from data.processes.pool import map_in_order
from data.sets.origin import load_origin
from data.sets.terminal import progress_bar
from data.sets.work_folder import OutputError
from data.sources.source import HASH_BYTES, Item, Source, hash_of

_CHUNK_ITEMS = 32


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


def filtered(job: Preparation, run: MapInOrder, console: Console) -> tuple[Preparation, list[Removed]]:
    """The task with the images that its filters leave, and what each filter took away; see `apply_filters`."""
    if not job.options.filters:
        return job, []
    source, removed = apply_filters(job.source, job.options.filters, run, console)
    return replace(job, source=source), removed


def refuse_other_origin(job: Preparation, console: Console) -> None:
    """Check that a prepared data set was made from these images.

    Args:
        job: its target is a prepared data set of the same description, names, sizes and options.
        console: shows progress if the images must be read.

    Raises:
        OutputError: it was made from others.
    """
    origin = load_origin(job.target)
    # Earlier data sets have none.
    if origin is None or origin.state == job.source.state:
        return
    job, _ = filtered(job, partial(map_in_order, workers=job.options.workers), console)
    if origin.content != read_content(job.source, job.source.items, job.options.workers, console):
        raise OutputError(
            f"--out {job.target} holds a data set of other images: their names and sizes are the same, their content "
            "is not; choose another --out, or remove it yourself"
        )
