"""The journal of a preparation: its job, the finished shards, and the number of source images in them."""

from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, PositiveInt, TypeAdapter, ValidationError, with_config

from data.shards.index import Shard
from data.storage.files import json_bytes, write_json


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """One shard, and the source images taken for it."""

    shard: Shard
    """The file."""
    num_items: PositiveInt
    """Source images taken since the previous shard, including unusable ones."""
    bad: list[str]
    """A line for each unusable image among them."""
    content: str
    """`content_of` for these images."""
    sides: dict[str, int] = field(default_factory=dict)
    """Images of the shard by the short side of their original in pixels."""


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True)
class Journal:
    """Content of journal.json."""

    format: Literal["ddgan-preparation"] = "ddgan-preparation"
    """Identifies the file format."""
    version: Literal[2] = 2
    """Version of the format."""
    job: dict[str, int | float | str | bool | None]
    """Everything that determines the bytes of the result."""
    state: str
    """The source's `state` when its images were listed."""
    finished: list[FinishedShard]
    """The finished shards, in order."""

    @property
    def shards(self) -> list[Shard]:
        """The finished shards only."""
        return [entry.shard for entry in self.finished]

    @property
    def num_items(self) -> int:
        """Finished source images, including unusable ones."""
        return sum(entry.num_items for entry in self.finished)

    @property
    def bad(self) -> list[str]:
        """A line for each unusable image among them."""
        return [line for entry in self.finished for line in entry.bad]

    @property
    def sides(self) -> dict[str, int]:
        """Images by the short side of their original in pixels, in ascending order."""
        counts = sum((Counter(entry.sides) for entry in self.finished), Counter[str]())
        return {side: counts[side] for side in sorted(counts, key=int)}

    def extended(
        self, shard: Shard, *, num_items: int, bad: list[str], content: str, sides: dict[str, int]
    ) -> "Journal":
        """Add a shard; `num_items` and `bad` count from the start of the source, the rest from the last shard."""
        entry = FinishedShard(
            shard=shard,
            num_items=num_items - self.num_items,
            bad=bad[len(self.bad) :],
            content=content,
            sides=dict(sides),
        )
        return replace(self, finished=[*self.finished, entry])

    def save(self, file: Path) -> None:
        """Write it; after a crash the file is the old or the new one."""
        write_json(file, asdict(self))

    def content(self) -> bytes:
        """What `save` writes."""
        return json_bytes(asdict(self))


_JOURNAL = TypeAdapter(Journal)


def load_journal(file: Path) -> Journal | None:
    """Read a journal; None if it is missing, or this program did not write it."""
    try:
        return parse_journal(file.read_bytes())
    except FileNotFoundError:
        return None


def parse_journal(content: bytes) -> Journal | None:
    """A journal from its bytes; None if this program did not write it."""
    try:
        return _JOURNAL.validate_json(content)
    except ValidationError:
        return None
