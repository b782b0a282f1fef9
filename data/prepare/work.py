"""Runs a preparation: encode in worker processes, write in a fixed order, publish at the end.

A journal lists the finished shards, so that the same command resumes after the last one.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from data.prepare.encode import TOO_SMALL, Prepared, PreparedForm, prepare_items
from data.prepare.filters import Removed
from data.prepare.job import Preparation, describe_difference, find_prepared
from data.prepare.journal import Journal, load_journal
from data.prepare.origin import content_of, filtered, read_content, refuse_other_origin
from data.processes.pool import WorkerError, map_in_order
from data.sets.origin import Origin
from data.sets.terminal import progress_bar
from data.sets.work_folder import WorkFolder, remove_emptied
from data.shards.index import FORMAT_NAME, FORMAT_VERSION, IndexDocument, Shard, ShardIndex, load_index
from data.shards.verification import is_intact
from data.shards.writer import ShardSequence, write_index
from data.sources.source import Item, SourceError, shown_name
from data.storage.errors import OperationError, StoppedError

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


def prepare(job: Preparation, console: Console) -> Outcome:
    """Run or resume a preparation.

    Args:
        job: the task.
        console: shows notes and the progress bar.

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
            job, removed = filtered(job, console)
            bad = _write(job, work, console)
            work.publish()
        except (PreparationError, SourceError, OSError):
            work.remove()
            raise
        except KeyboardInterrupt:
            raise InterruptedPreparationError(f"interrupted; {_keep(job, work)}") from None
        except WorkerError as error:
            raise PreparationError(f"{error}; {_keep(job, work)}") from None
    return Outcome(index=load_index(job.target), bad=bad, removed=removed, was_there=False)


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


def _write(job: Preparation, work: WorkFolder, console: Console) -> list[str]:
    """Write the missing shards and the index; return a line for each skipped image."""
    source, options = job.source, job.options
    with progress_bar(console) as progress:
        journal = _resume(job, work, progress)
        bad, done = journal.bad, journal.num_items
        hashes: list[int] = []
        sides = Counter[str]()
        _refuse_bad(bad, job)
        task = progress.add_task("preparing", total=len(source.items), completed=done)
        with (
            ShardSequence(
                work.result,
                shard_samples=options.shard_samples,
                shard_bytes=None if options.shard_mb is None else options.shard_mb * 10**6,
                finished=journal.shards,
            ) as shards,
            # Close it here, as it holds the worker processes: a traceback could keep it alive.
            contextlib.closing(_prepared_in_order(job, start=done)) as samples,
        ):
            shard: Shard | None

            def keep(shard: Shard) -> None:
                nonlocal journal
                journal = journal.extended(shard, num_items=done, bad=bad, content=content_of(hashes), sides=sides)
                journal.save(work.journal)
                hashes.clear()
                sides.clear()

            for number, prepared in samples:
                done += 1
                hashes.append(prepared.source_hash)
                progress.advance(task)
                if prepared.error is not None:
                    bad.append(f"{shown_name(prepared.item.name)} {shown_name(prepared.error)}")
                    _refuse_bad(bad, job)
                    continue
                sides[str(prepared.side)] += 1
                if shard := shards.write(_key(number, prepared.item), _members(prepared, options.form)):
                    keep(shard)
            if shard := shards.finish():
                keep(shard)
    if not shards.shards:
        raise PreparationError("no usable image is left:\n" + "\n".join(shorten(bad)))
    # Before the index, which makes the folder a data set.
    finished = (int(entry.content, 16) for entry in journal.finished)
    Origin(state=journal.state, content=content_of([*finished, *hashes]), sides=journal.sides).save(work.result)
    write_index(work.result, _index_document(job, shards.shards))
    return bad


def _resume(job: Preparation, work: WorkFolder, progress: Progress) -> Journal:
    """The finished, intact shards of this job; everything else in the folder is removed."""

    def note(message: str) -> None:
        progress.console.print(f"data.prepare: {message}", markup=False, highlight=False)

    identity = job.identity()
    journal = load_journal(work.journal)
    if journal is None or journal.job != identity:
        if journal is not None and journal.finished:
            note(f"other unfinished work in {work.path} is discarded ({describe_difference(identity, journal.job)})")
        journal = Journal(job=identity, state=job.source.state, finished=[])
    intact = 0
    order = _order(job)
    is_same = journal.state == job.source.state
    num_items = 0
    task = progress.add_task("checking finished shards", total=len(journal.finished), visible=bool(journal.finished))
    for entry in journal.finished:
        damaged = [work.result / file.name for file in entry.shard.files if not is_intact(work.result, file)]
        if damaged:
            note(f"{damaged[0]} is damaged; shard {entry.shard.name} and those after it are prepared again")
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
    journal.save(work.journal)
    work.discard(keep=frozenset(file.name for shard in journal.shards for file in shard.files))
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


def _key(number: int, item: Item) -> str:
    """The number in the source makes it unique; the end of the name makes error messages readable."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", item.name.rpartition(".")[0] or item.name)[-_KEY_NAME_LENGTH:]
    return f"{number:09d}-{readable}"


def _members(prepared: Prepared, form: PreparedForm) -> dict[str, bytes]:
    members = {form.extension: prepared.content}
    if prepared.item.label is not None:
        members["cls"] = str(prepared.item.label).encode()
    return members


def _prepared_in_order(job: Preparation, *, start: int) -> Generator[tuple[int, Prepared], None, None]:
    """The prepared images with their numbers in the source, in shuffled order from position `start`."""
    items = job.source.items
    order = _order(job)
    places = range(start, len(order), _CHUNK_ITEMS)
    chunks = ([items[number] for number in order[place : place + _CHUNK_ITEMS].tolist()] for place in places)
    work = partial(prepare_items, job.source, form=job.options.form)
    with contextlib.closing(map_in_order(work, chunks, job.options.workers)) as results:
        for place, prepared in zip(places, results, strict=True):
            yield from zip(order[place : place + _CHUNK_ITEMS].tolist(), prepared, strict=True)


def _order(job: Preparation) -> npt.NDArray[np.intp]:
    """The numbers of the source's images in shuffled order."""
    draws = np.random.Philox(key=np.array([job.options.seed, 0], dtype=np.uint64)).random_raw(len(job.source.items))
    return np.argsort(np.asarray(draws), kind="stable")
