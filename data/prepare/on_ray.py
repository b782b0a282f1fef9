"""The same preparation as tasks on a Ray cluster. The only file of `data` that imports Ray.

Images are read and encoded by tasks, which leave the results where they run. From what those say of their images the
driver decides which go into which shard; further tasks fetch them, and write the shard to the folder or URL. So its
shards are those of one machine. The driver handles no image, but for those that no other machine can read, which it
sends along. Ray does again the tasks of a node that is lost, and those whose results were there.
"""

import contextlib
import os
import platform
import secrets
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from data.prepare.encode import Prepared, PreparedForm, prepare_items
from data.prepare.job import Preparation
from data.prepare.journal import Journal
from data.prepare.places import Place
from data.prepare.work import Chunk, Cut, Tally, chunks_of, key_of, members_of
from data.processes.ray_environment import set_up_ray
from data.sets.transfer import send
from data.shards.index import Shard, offsets_name
from data.shards.writer import ShardSequence, sample_bytes
from data.sources.source import HeldSource, Item, Source, hash_of, shown_name
from data.storage.errors import OperationError
from data.storage.files import replaced
from data.storage.location import DataError, is_remote
from data.storage.writable import WritableStorage

_TASKS_PER_CPU = 4
"""Encoding tasks that are waiting or running, so that no CPU waits for the driver."""
_SHARDS_PER_CPU = 1
"""Shards that are waiting or being written."""
_RETRIES = 20
"""How often Ray does a task again whose node or process is lost."""
_Seen = tuple[str, list[tuple[Prepared, int]]]
"""The name of a node, and what it made of some images, without their contents but with their sizes in a shard."""
Contents = list[bytes]
"""The encoded images of a chunk; empty for unusable ones."""


class _Sample(NamedTuple):
    """An image on its way into a shard."""

    key: str
    label: int | None
    chunk: int
    """Which of the shard's chunks has it."""
    place: int
    """Its place there."""


@dataclass
class _Draft:
    """A shard that is being put together."""

    samples: list[_Sample] = field(default_factory=list)
    chunks: list[Any] = field(default_factory=list)
    """References to the contents of chunks."""
    num_bytes: int = 0


class RayWay:
    """Does the work on the Ray that `connected` found; see `data.prepare.work.Way`."""

    def __init__(self, num_cpus: int) -> None:
        self._num_cpus = num_cpus

    def map_in_order(self, work: Callable[[Any], Any], tasks: Iterable[Any]) -> Generator[Any, None, None]:
        """See `Way`."""
        do = _task(_call)
        shared = _ray().put(work)
        with _explained():
            for _, result in self._ahead((task, do.remote(shared, task)) for task in tasks):
                yield _ray().get(result)

    def write_shards(self, job: Preparation, place: Place, journal: Journal, tally: Tally) -> Journal:
        """See `Way`."""
        form, options = job.options.form, job.options
        encode, write = _task(_encode, num_returns=2), _task(_write)
        shared = None if job.source.only_here else _ray().put(job.source)
        draft, waiting = _Draft(), deque[tuple[Cut, Any]]()
        num_shards = len(journal.shards)

        def submit() -> None:
            nonlocal draft, num_shards
            name = f"{num_shards:05d}.tar"
            written = write.remote(place.location, name, form, draft.samples, *draft.chunks)
            waiting.append((tally.cut(), written))
            draft, num_shards = _Draft(), num_shards + 1

        def collect(most: int) -> None:
            """Put shards into the journal, in their order, until at most so many are waited for."""
            nonlocal journal
            while waiting and (len(waiting) > most or _ray().wait([waiting[0][1]], timeout=0)[0]):
                cut, written = waiting.popleft()
                journal = tally.extended(journal, _ray().get(written), cut)
                place.save(journal)

        def start(chunk: Chunk) -> tuple[Chunk, Any]:
            source = HeldSource.of(job.source, chunk.items) if shared is None else shared
            return chunk, encode.remote(source, form, chunk.items)

        with _explained():
            for chunk, (seen, contents) in self._ahead(map(start, chunks_of(job, tally.done))):
                node, samples = _ray().get(seen)
                for at, (number, (sample, num_bytes)) in enumerate(zip(chunk.numbers, samples, strict=True)):
                    refuse_other_view(job.source, sample, node)
                    if not tally.take(sample):
                        continue
                    if not draft.chunks or draft.chunks[-1] is not contents:
                        draft.chunks.append(contents)
                    key, label = key_of(number, sample.item), sample.item.label
                    draft.samples.append(_Sample(key, label, len(draft.chunks) - 1, at))
                    draft.num_bytes += num_bytes
                    full = options.shard_samples is not None and len(draft.samples) >= options.shard_samples
                    if full or (options.shard_mb is not None and draft.num_bytes >= options.shard_mb * 10**6):
                        submit()
                collect(_SHARDS_PER_CPU * self._num_cpus)
            if draft.samples:
                submit()
            collect(0)
        return journal

    def _ahead(self, started: Iterator[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Start tasks some way ahead of the consumer."""
        waiting = deque(islice(started, _TASKS_PER_CPU * self._num_cpus))
        while waiting:
            yield waiting.popleft()
            waiting.extend(islice(started, 1))


@contextlib.contextmanager
def connected() -> Iterator[RayWay]:
    """Connect to the cluster in RAY_ADDRESS, or start a local Ray on this machine, which needs a token.

    Raises:
        UserError: RAY_ADDRESS or RAY_TMPDIR cannot be used.
        OperationError: Ray does not start, or does not let us in.
    """
    set_up_ray()
    address = os.environ.get("RAY_ADDRESS") or "local"
    ray = _ray()
    try:
        own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address == "local" else {}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:  # Ray raises errors of many types, some with a whole log file as message
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise OperationError(f"cannot connect to the Ray at {address}: {reason}") from error
    try:
        yield RayWay(max(1, int(ray.cluster_resources().get("CPU", 1))))
    finally:
        ray.shutdown()


def _ray() -> Any:
    """Ray, which takes seconds to import, and reads the environment meanwhile."""
    import ray

    return ray


def _task(function: Callable[..., Any], num_returns: int = 1) -> Any:
    return _ray().remote(num_cpus=1, num_returns=num_returns, max_retries=_RETRIES)(function)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raise the errors of tasks as if they had come up here."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OperationError(f"Ray gave up: {reason}; the same command continues") from error


def _call(work: Callable[[Any], Any], task: Any) -> Any:
    return work(task)


def _encode(source: Source, form: PreparedForm, items: list[Item]) -> tuple[_Seen, Contents]:
    """What the driver needs of each image, with the bytes that it takes of a shard; and the contents."""
    prepared = prepare_items(source, items, form)
    seen = [(sample._replace(content=b""), sample_bytes(members_of(sample, form))) for sample in prepared]
    return (platform.node(), seen), [sample.content for sample in prepared]


def refuse_other_view(source: Source, sample: Prepared, node: str) -> None:
    """Refuse a node that cannot read an image which can be read here: it would be left out as unusable.

    Args:
        source: the images.
        sample: what the node made of one of them.
        node: its name.

    Raises:
        DataError: the image can be read here.
    """
    item = sample.item
    if sample.error is None or source.only_here or sample.source_hash != hash_of(item, b""):
        return
    try:
        is_here = bool(source.read(item) + source.read_condition(item))
    except OSError:
        return
    if is_here:
        raise DataError(
            f"node {node} cannot read the image {shown_name(item.name)} of the source {shown_name(source.description)} "
            f"({shown_name(sample.error)}), but this machine can; give every node the source under the same name, or "
            "upload it and give its URL"
        )


def _write(location: str, name: str, form: PreparedForm, samples: list[_Sample], *chunks: Contents) -> Shard:
    """Write a shard and its offsets, first to a disk of this node. Raises DataError if that has no room."""
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddgan-shard-")))
            shard = _write_here(folder, name, form, samples, chunks)
        except OSError as error:
            raise DataError(
                f"node {platform.node()} cannot write a shard to {tempfile.gettempdir()}: {error.strerror or error}; "
                "free some space there, or set TMPDIR where its Ray is started"
            ) from None
        if is_remote(location):
            target = WritableStorage(location)
            for file in shard.files:
                send(target, folder, file, threading.Event())
        else:
            for file in shard.files:
                # Ray may take a node for lost that still writes: the name of the draft is of this task alone.
                draft = f".{file.name}.{secrets.token_hex(8)}.tmp"
                with replaced(Path(location, file.name), durable=True, draft=draft) as unfinished:
                    shutil.copyfile(folder / file.name, unfinished)
    return shard


def _write_here(
    folder: Path, name: str, form: PreparedForm, samples: list[_Sample], chunks: Sequence[Contents]
) -> Shard:
    """Write a shard and its offsets to a local folder, under their names in the data set."""
    with ShardSequence(folder, shard_samples=None, shard_bytes=None) as shards:
        for sample in samples:
            item = Item("", 0, sample.label)
            shards.write(sample.key, members_of(Prepared(item, chunks[sample.chunk][sample.place]), form))
        first = shards.finish()
    assert first is not None
    assert first.offsets is not None
    shard = replace(first, name=name, offsets=replace(first.offsets, name=offsets_name(name)))
    for own, file in zip(first.files, shard.files, strict=True):
        (folder / own.name).rename(folder / file.name)
    return shard
