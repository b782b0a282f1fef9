"""Runs a preparation: encode in worker processes, write in a fixed order, publish at the end.

A journal lists the finished shards, so that the same command resumes after the last one.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from data.prepare.encode import TOO_SMALL, Prepared, PreparedForm, prepare_items
from data.prepare.filters import MapInOrder, Removed
from data.prepare.job import Preparation, describe_difference, find_prepared
from data.prepare.journal import Journal, load_journal
from data.prepare.origin import content_of, filtered, read_content, refuse_other_origin
from data.prepare.places import FolderPlace, Place, UrlPlace
from data.processes.pool import WorkerError, map_in_order
from data.sets.origin import Origin
from data.sets.terminal import progress_bar
from data.sets.work_folder import WorkFolder, remove_emptied
from data.shards.index import FORMAT_NAME, FORMAT_VERSION, IndexDocument, Shard, ShardIndex, load_index
from data.shards.writer import ShardSequence
from data.sources.source import Item, SourceError, shown_name
from data.storage.errors import OperationError, StoppedError
from data.storage.location import DataError
from data.storage.redaction import redact

_CHUNK_ITEMS = 32
"""Images per task of a worker."""
_SHOWN_BAD = 50
_KEY_NAME_LENGTH = 60


class PreparationError(OperationError):
    """The preparation failed; the message says why."""


class InterruptedPreparationError(StoppedError):
    """The preparation was stopped on request; the message says what is kept."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of a preparation."""

    index: ShardIndex
    """Index of the data set."""
    bad: list[str]
    """A line for each skipped image."""
    removed: list[Removed] = field(default_factory=list)
    """What the filters took away."""
    was_there: bool
    """It was prepared already."""


class Chunk(NamedTuple):
    """Images that are prepared by one task."""

    numbers: list[int]
    """Their numbers in the source."""
    items: list[Item]


class Cut(NamedTuple):
    """Where a shard ends."""

    num_items: int
    """Images of the source up to there, unusable ones included."""
    num_bad: int
    """Of these, unusable ones."""
    content: str
    """`content_of` for the images since the last shard."""
    sides: dict[str, int]
    """Images since the last shard, by the short side of the original."""


class Way(Protocol):
    """Who does the work. Every way gives the same bytes."""

    def map_in_order(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Generator[Any, None, None]:
        """The results of picklable tasks, in their order."""
        ...

    def write_shards(self, job: Preparation, place: Place, journal: Journal, tally: "Tally") -> Journal:
        """Write the shards after those of the journal; return the journal with them."""
        ...


def prepare(job: Preparation, console: Console, *, way: Way | None = None) -> Outcome:
    """Run or resume a preparation.

    Args:
        job: the task.
        console: shows notes and the progress bar.
        way: who does the work; None: processes of this machine.

    Raises:
        OutputError: the target holds something else, or another process prepares it.
        PreparationError: too many unusable images, or a worker died; only a dead worker keeps finished shards.
        InterruptedPreparationError: Ctrl-C; finished shards are kept.
        OSError: the result could not be written; nothing is left behind.
    """
    index = _find_prepared(job, console)
    if index is not None:
        remove_emptied(job.target)
        return Outcome(index=index, bad=[], was_there=True)
    with WorkFolder(job.target) as work:
        # Another process may have finished just before this one locked the folder.
        index = _find_prepared(job, console)
        if index is not None:
            work.remove()
            return Outcome(index=index, bad=[], was_there=True)
        try:
            way = way or LocalWay(job.options.workers)
            job, removed = filtered(job, _who_looks(job, way), console)
            bad = write(job, FolderPlace(work), way, console)
            work.publish()
        except (PreparationError, SourceError, OSError):
            work.remove()
            raise
        except KeyboardInterrupt:
            raise InterruptedPreparationError(f"interrupted; {_keep(job, work)}") from None
        except (WorkerError, DataError) as error:  # DataError: the source's storage does not answer any more
            raise PreparationError(f"{error}; {_keep(job, work)}") from None
    return Outcome(index=load_index(job.target), bad=bad, removed=removed, was_there=False)


def prepare_at_url(job: Preparation, place: UrlPlace, console: Console, *, way: Way) -> Outcome:
    """Run or resume a preparation whose shards are written to a URL.

    Args:
        job: the task; its target is not used.
        place: the URL.
        console: shows notes and the progress bar.
        way: who does the work.

    Raises:
        OutputError: something else is at the URL.
        PreparationError: too many unusable images.
        InterruptedPreparationError: Ctrl-C.
        StorageError: the URL could not be written; finished shards are kept, here and above.
    """
    index = place.find(job)
    if index is not None:
        return Outcome(index=index, bad=[], was_there=True)
    try:
        job, removed = filtered(job, _who_looks(job, way), console)
        bad = write(job, place, way, console)
    except KeyboardInterrupt:
        raise InterruptedPreparationError(f"interrupted; the same command continues at {place.shown}") from None
    except DataError as error:  # a node cannot do its part
        raise PreparationError(f"{error}; the same command continues at {place.shown}") from None
    return Outcome(index=load_index(place.location), bad=bad, removed=removed, was_there=False)


def _who_looks(job: Preparation, way: Way) -> MapInOrder:
    """What looks at the images that filters judge: processes of this machine, where no other one can read them."""
    return (LocalWay(job.options.workers) if job.source.only_here else way).map_in_order


def _find_prepared(job: Preparation, console: Console) -> ShardIndex | None:
    index = find_prepared(job)
    if index is not None:
        refuse_other_origin(job, console)
    return index


def shorten(lines: list[str]) -> list[str]:
    """Indent a list of files, and cut it to a screen or two."""
    rest = [f"  and {len(lines) - _SHOWN_BAD} more"] if len(lines) > _SHOWN_BAD else []
    return [f"  {line}" for line in lines[:_SHOWN_BAD]] + rest


def _keep(job: Preparation, work: WorkFolder) -> str:
    """Keep finished shards for the next run; return a note on them."""
    journal = load_journal(work.journal)
    if not work.result.exists():
        work.remove()
        return f"{job.target} was just finished"
    if journal is None or not journal.finished or journal.job != job.identity():
        work.remove()
        return "nothing is left behind, run the same command again"
    return f"{len(journal.finished)} finished shards are kept in {work.path}: the same command continues after them"


class Tally:
    """What has been done, image by image, in the order of the preparation."""

    def __init__(self, job: Preparation, journal: Journal, advance: Callable[[], None]) -> None:
        self._job = job
        self._advance = advance
        self.done = journal.num_items
        """Images of the source that are done, unusable ones included."""
        self.bad = journal.bad
        """A line for each unusable image."""
        self.hashes: list[int] = []
        """Of the images since the last shard."""
        self._sides = Counter[str]()

    def take(self, prepared: Prepared) -> bool:
        """Count an image; return whether it goes into a shard.

        Raises:
            PreparationError: too many are unusable.
        """
        self.done += 1
        self.hashes.append(prepared.source_hash)
        self._advance()
        if prepared.error is not None:
            self.bad.append(f"{shown_name(prepared.item.name)} {shown_name(prepared.error)}")
            _refuse_bad(self.bad, self._job)
            return False
        self._sides[str(prepared.side)] += 1
        return True

    def cut(self) -> Cut:
        """What a shard that ends here has in the journal."""
        cut = Cut(self.done, len(self.bad), content_of(self.hashes), dict(self._sides))
        self.hashes, self._sides = [], Counter()
        return cut

    def extended(self, journal: Journal, shard: Shard, cut: Cut) -> Journal:
        """The journal with a shard."""
        bad = self.bad[: cut.num_bad]
        return journal.extended(shard, num_items=cut.num_items, bad=bad, content=cut.content, sides=cut.sides)


class LocalWay:
    """Encodes in processes of this machine and writes here."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def map_in_order(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Generator[Any, None, None]:
        """See `Way`."""
        return map_in_order(work, tasks, self._workers)

    def write_shards(self, job: Preparation, place: Place, journal: Journal, tally: Tally) -> Journal:
        """See `Way`."""
        options = job.options
        work = partial(prepare_items, job.source, form=options.form)
        with (
            ShardSequence(
                Path(place.location),
                shard_samples=options.shard_samples,
                shard_bytes=None if options.shard_mb is None else options.shard_mb * 10**6,
                finished=journal.shards,
            ) as shards,
            # Close it here, as it holds the worker processes: a traceback could keep it alive.
            contextlib.closing(
                self.map_in_order(work, (chunk.items for chunk in chunks_of(job, tally.done)))
            ) as results,
        ):
            shard: Shard | None
            for chunk, prepared in zip(chunks_of(job, tally.done), results, strict=True):
                for number, sample in zip(chunk.numbers, prepared, strict=True):
                    if not tally.take(sample):
                        continue
                    if shard := shards.write(key_of(number, sample.item), members_of(sample, options.form)):
                        journal = tally.extended(journal, shard, tally.cut())
                        place.save(journal)
            if shard := shards.finish():
                journal = tally.extended(journal, shard, tally.cut())
                place.save(journal)
        return journal


def write(job: Preparation, place: Place, way: Way, console: Console) -> list[str]:
    """Write the missing shards and the index; return a line for each skipped image. Raises what `prepare` raises."""
    with progress_bar(console) as progress:
        journal = _resume(job, place, progress)
        task = progress.add_task("preparing", total=len(job.source.items), completed=journal.num_items)
        tally = Tally(job, journal, partial(progress.advance, task))
        _refuse_bad(tally.bad, job)
        journal = way.write_shards(job, place, journal, tally)
    if not journal.finished:
        raise PreparationError("no usable image is left:\n" + "\n".join(shorten(tally.bad)))
    finished = (int(entry.content, 16) for entry in journal.finished)
    origin = Origin(state=journal.state, content=content_of([*finished, *tally.hashes]), sides=journal.sides)
    place.finish(origin, _index_document(job, journal.shards))
    return tally.bad


def _resume(job: Preparation, place: Place, progress: Progress) -> Journal:
    """The finished, intact shards of this job; everything else in the folder is removed."""

    def note(message: str) -> None:
        progress.console.print(f"data.prepare: {message}", markup=False, highlight=False)

    identity = job.identity()
    journal = place.load()
    if journal is None or journal.job != identity:
        if journal is not None and journal.finished:
            note(f"other unfinished work in {place.shown} is discarded ({describe_difference(identity, journal.job)})")
        journal = Journal(job=identity, state=job.source.state, finished=[])
    intact = 0
    order = _order(job)
    is_same = journal.state == job.source.state
    num_items = 0
    task = progress.add_task("checking finished shards", total=len(journal.finished), visible=bool(journal.finished))
    for entry in journal.finished:
        damaged = [file.name for file in entry.shard.files if not place.is_intact(file)]
        if damaged:
            where = f"{redact(place.location)}/{damaged[0]}"
            note(f"{where} is damaged; shard {entry.shard.name} and those after it are prepared again")
            break
        items = [job.source.items[number] for number in order[num_items : num_items + entry.num_items].tolist()]
        if not is_same and read_content(job.source, items, job.options.workers, progress.console) != entry.content:
            note(f"images of the source have changed; shard {entry.shard.name} and those after it are prepared again")
            break
        num_items += entry.num_items
        intact += 1
        progress.advance(task)
    progress.remove_task(task)
    journal = replace(journal, state=job.source.state, finished=journal.finished[:intact])
    # The journal first: it never lists missing shards.
    place.save(journal)
    place.discard(keep=frozenset(file.name for shard in journal.shards for file in shard.files))
    if intact:
        note(f"continuing after {intact} finished shards, {journal.num_items} of {len(job.source.items)} images")
    return journal


def _refuse_bad(bad: list[str], job: Preparation) -> None:
    num_items, percent = len(job.source.items), job.options.max_bad_percent
    # Exact: 0.57% of 10,000 is 57, but 56.99 in floating point.
    allowed = math.floor(num_items * Fraction(str(percent)) / 100)
    if len(bad) > allowed:
        # Stop here: if all images are bad, checking a large source would take hours.
        enlarge = "; --upscale enlarges those that are too small" if any(TOO_SMALL in line for line in bad) else ""
        raise PreparationError(
            f"at least {len(bad)} of {num_items} images are unusable, --max-bad {percent:g} allows {allowed}; "
            f"mend or remove them, or allow more{enlarge}:\n" + "\n".join(shorten(bad))
        )


def _index_document(job: Preparation, shards: list[Shard]) -> IndexDocument:
    names = job.source.class_names
    return IndexDocument(
        format=FORMAT_NAME,
        version=FORMAT_VERSION,
        image_size=job.options.form.size,
        image_channels=job.options.form.channels,
        num_classes=None if names is None else len(names),
        class_names=None if names is None else list(names),
        source=job.source.description,
        source_fingerprint=job.fingerprint,
        options=job.options.recorded(),
        shards=shards,
        condition_channels=job.options.form.condition_channels or None,
    )


def key_of(number: int, item: Item) -> str:
    """The number in the source makes it unique; the end of the name makes error messages readable."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", item.name.rpartition(".")[0] or item.name)[-_KEY_NAME_LENGTH:]
    return f"{number:09d}-{readable}"


def members_of(prepared: Prepared, form: PreparedForm) -> dict[str, bytes]:
    """The members of a sample in its shard, by extension."""
    members = {form.extension: prepared.content}
    if prepared.item.label is not None:
        members["cls"] = str(prepared.item.label).encode()
    return members


def chunks_of(job: Preparation, start: int) -> Iterator[Chunk]:
    """The images of the source in shuffled order from position `start`, some at a time."""
    items, order = job.source.items, _order(job)
    for place in range(start, len(order), _CHUNK_ITEMS):
        numbers: list[int] = order[place : place + _CHUNK_ITEMS].tolist()
        yield Chunk(numbers, [items[number] for number in numbers])


def _order(job: Preparation) -> npt.NDArray[np.intp]:
    """The numbers of the source's images in shuffled order."""
    draws = np.random.Philox(key=np.array([job.options.seed, 0], dtype=np.uint64)).random_raw(len(job.source.items))
    return np.argsort(np.asarray(draws), kind="stable")
