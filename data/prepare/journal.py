"""The journal of a preparation: which job it is, which shards are finished, and how far into the source they reach."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from data.shards.index import Shard
from data.storage.files import write_json


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """One shard, and what was taken from the source for it."""

    shard: Shard
    """The file."""
    num_items: Annotated[int, Field(gt=0)]
    """Images of the source that were taken since the shard before, the unusable ones included."""
    bad: list[str]
    """A line for each unusable one among them."""


@with_config(ConfigDict(extra="forbid", strict=True))
@dataclass(frozen=True, kw_only=True)
class Journal:
    """What journal.json holds."""

    format: Literal["ddgan-preparation"] = "ddgan-preparation"
    """Tells the file from others of its name."""
    version: Literal[1] = 1
    """Version of this format."""
    job: dict[str, int | float | str | bool | None]
    """Everything that decides on the bytes of the result."""
    finished: list[FinishedShard]
    """The finished shards, in their order."""

    @property
    def shards(self) -> list[Shard]:
        """The finished shards alone."""
        return [entry.shard for entry in self.finished]

    @property
    def num_items(self) -> int:
        """Images of the source that are done, the unusable ones included."""
        return sum(entry.num_items for entry in self.finished)

    @property
    def bad(self) -> list[str]:
        """A line for each unusable image among them."""
        return [line for entry in self.finished for line in entry.bad]

    def extended(self, shard: Shard, *, num_items: int, bad: list[str]) -> "Journal":
        """With one more shard; `num_items` and `bad` count from the start of the source."""
        entry = FinishedShard(shard=shard, num_items=num_items - self.num_items, bad=bad[len(self.bad) :])
        return replace(self, finished=[*self.finished, entry])

    def save(self, file: Path) -> None:
        """Write it; a crash leaves this one or the one before."""
        write_json(file, asdict(self))


_JOURNAL = TypeAdapter(Journal)


def load_journal(file: Path) -> Journal | None:
    """Read a journal; None if there is none, or none that this program wrote."""
    try:
        return _JOURNAL.validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
