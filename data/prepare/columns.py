"""The columns of third-party WebDataset shards: the .json next to each image, as img2dataset writes it."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from data.sources.source import Item, Source, SourceError
from data.sources.tars import TarSource, members_of

_MAX_JSON_BYTES = 2**20
Row = dict[str, Any]
"""Values by column; empty for an image without a .json."""


class ShardImages(NamedTuple):
    """Images of one shard."""

    shard: str
    members: list[str]


def with_columns(source: Source) -> TarSource:
    """The source, if it may have columns.

    Raises:
        SourceError: it has none.
    """
    if not isinstance(source, TarSource):
        raise SourceError(
            f"source {source.description} has no columns for --where; WebDataset shards with .json members have them, "
            "such as img2dataset's"
        )
    return source


def by_shard(items: Iterable[Item]) -> Iterator[ShardImages]:
    """The images of a `TarSource` in their order, shard by shard."""
    for shard, some in groupby(items, key=lambda item: item.name.partition("/")[0].rpartition("@")[0]):
        yield ShardImages(shard, [item.name.partition("/")[2] for item in some])


def rows_of(source: TarSource, images: ShardImages) -> Iterator[Row]:
    """The row of each image of a shard.

    Raises:
        SourceError: the shard is damaged.
        OSError: it cannot be read.
    """
    file = source.folder / images.shard
    places = {
        member.name: (member.offset_data, member.size)
        for member in members_of(file)
        if member.isreg() and member.name.lower().endswith(".json")
    }
    with file.open("rb", buffering=0) as stream:
        for name in images.members:
            place = next((places[other] for other in _names(name) if other in places), None)
            yield {} if place is None else _row(os.pread(stream.fileno(), min(place[1], _MAX_JSON_BYTES), place[0]))


def _names(image: str) -> Sequence[str]:
    """Where the .json of an image may be: its name up to the first or to the last dot is the sample's."""
    folder, slash, file = image.rpartition("/")
    return [f"{folder}{slash}{stem}.json" for stem in (file.partition(".")[0], file.rpartition(".")[0])]


def _row(content: bytes) -> Row:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}
