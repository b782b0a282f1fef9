"""Batches of images for one rank: WebDataset stages in loader processes, whose number does not change the order."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from pydantic import Field
from torch.utils.data import DataLoader, Dataset, get_worker_info
from webdataset.pipeline import DataPipeline

from data.decode import decode_into
from data.partition import IntArray, SampleOrder, Span, micro_batch_spans
from data.processes import LoaderContext, initialize_loader
from data.reader import EncodedSample, ReaderCache
from data.shards import DataError, ShardIndex

_MAX_OPEN_SHARDS = 256
"""Bound on the open files of a loader process, well below the usual limit of 1024."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads and how."""

    path: str
    """Folder of a prepared data set: tar shards and index.json, made by `python -m data.prepare`."""
    image_size: Annotated[int, Field(ge=4)]
    """Height and width of the images in pixels; it must equal the prepared size."""
    image_channels: Literal[1, 3] = 3
    """1 for grey, 3 for RGB; it must equal the prepared number."""
    horizontal_flip: bool = True
    """Mirror each image with probability 1/2. Drawn and done on the device, so that it is the same for any rank."""
    loader_workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes of each rank that read and decode; 0 decodes in the rank's own process."""
    shuffle_window_shards: Annotated[int, Field(gt=0)] = 8
    """Shards whose samples are mixed with one another: more mix better and keep more files open. Changes the order."""


class Batch(NamedTuple):
    """A micro-batch."""

    images: torch.Tensor
    """uint8 [B, C, H, W], contiguous."""
    labels: torch.Tensor
    """int64 [B]; 0 where the data set has none."""
    keys: tuple[str, ...] = ()
    """Key of each sample within its data set, for messages and tests."""


class _Numbered(NamedTuple):
    """What a loader process sends: batch number `number` of this rank, or the message of the error in its place."""

    number: int
    batch: Batch | None
    error: str = ""


class BatchIterator(Iterator[Batch]):
    """Endless micro-batches in order. Close it, or use it in a `with` statement, to end its loader processes."""

    def __init__(self, dataset: DataPipeline, *, loader_workers: int, pin_memory: bool) -> None:
        loader = DataLoader(
            cast("Dataset[_Numbered]", dataset),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=loader_workers,
            multiprocessing_context=LoaderContext() if loader_workers else None,
            worker_init_fn=initialize_loader if loader_workers else None,
            pin_memory=pin_memory,
            # Without a generator of its own, a DataLoader draws from torch's global one.
            generator=torch.Generator().manual_seed(0),
        )
        self._expected = 0
        self._source: Iterator[_Numbered] | None = iter(loader)

    def __next__(self) -> Batch:
        if self._source is None:
            raise StopIteration
        item = next(self._source)
        if item.batch is None:
            self.close()
            raise DataError(item.error)
        assert item.number == self._expected, f"loader gave micro-batch {item.number}, not {self._expected}"
        self._expected += 1
        return item.batch

    def close(self) -> None:
        """End the loader processes; further calls do nothing."""
        source, self._source = self._source, None
        # Dropping the last reference would do as well, but a traceback may hold on to it.
        shut_down = getattr(source, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_batches(
    config: DataConfig,
    index: ShardIndex,
    *,
    seed: int,
    global_batch_size: int,
    share: tuple[int, int],
    micro_batch_size: int,
    first_batch: int,
    pin_memory: bool = False,
) -> BatchIterator:
    """Stream a rank's part of the batches first_batch, first_batch + 1, ... for ever.

    Args:
        config: which form of images is expected, and how to read.
        index: the prepared data set.
        seed: decides on the order, with the index and the batch number alone.
        global_batch_size: samples of a batch over all ranks.
        share: [start, stop) within each global batch that this rank reads.
        micro_batch_size: samples of a micro-batch; the last one of a batch is smaller if it does not divide the share.
        first_batch: number of the batch to start with; only the shards that it needs are opened.
        pin_memory: put batches in page-locked memory, for copies to a GPU that overlap with its work.

    Raises:
        DataError: the data set is of another form than the config says; later, from the iterator, a bad sample.
    """
    _check_form(config, index)
    # Built here too, so that bad numbers are refused before a process is started.
    spans = partial(
        micro_batch_spans,
        global_batch_size=global_batch_size,
        share=share,
        micro_batch_size=micro_batch_size,
        first_batch=first_batch,
    )
    spans()
    order = partial(
        SampleOrder,
        [shard.num_samples for shard in index.shards],
        seed=seed,
        window_shards=config.shuffle_window_shards,
    )
    order()
    dataset = DataPipeline(
        partial(_locate, spans=spans, order=order),
        # A batch may reach from one window into the next one.
        partial(_fetch, index=index, open_shards=min(2 * config.shuffle_window_shards, _MAX_OPEN_SHARDS)),
        partial(_decode, index=index),
        _report_errors,
    )
    return BatchIterator(dataset, loader_workers=config.loader_workers, pin_memory=pin_memory)


def _unchanged(item: Any) -> Any:
    """In place of the DataLoader's conversion, which has nothing to convert here."""
    return item


def _check_form(config: DataConfig, index: ShardIndex) -> None:
    for name in ("image_size", "image_channels"):
        wanted, found = getattr(config, name), getattr(index, name)
        if wanted != found:
            raise DataError(
                f"data.{name} is {wanted}, but the data set at {index.directory} was prepared with {found}: "
                f"set data.{name} to {found} or prepare the data again"
            )


# The stages. WebDataset runs them one behind the other in each loader process. Its own splitters and shuffles are not
# used: they depend on rank, process and start time.


class _Located(NamedTuple):
    number: int
    shards: IntArray
    samples: IntArray


class _Fetched(NamedTuple):
    number: int
    samples: list[EncodedSample]


def _locate(*, spans: Callable[..., Iterator[Span]], order: Callable[[], SampleOrder]) -> Iterator[_Located]:
    """First stage: which samples make up the micro-batches of this loader process."""
    process = get_worker_info()
    sample_order = order()
    mine = spans() if process is None else spans(process=process.id, num_processes=process.num_workers)
    for number, start, stop in mine:
        yield _Located(number, *sample_order.locate(start, stop))


def _fetch(source: Iterable[_Located], *, index: ShardIndex, open_shards: int) -> Iterator[_Fetched]:
    """Second stage: their bytes."""
    readers = ReaderCache(index.directory, index.shards, open_shards)
    try:
        for number, shards, samples in source:
            places = zip(shards.tolist(), samples.tolist(), strict=True)
            yield _Fetched(number, [readers.read(shard, sample) for shard, sample in places])
    finally:
        readers.close()


def _decode(source: Iterable[_Fetched], *, index: ShardIndex) -> Iterator[_Numbered]:
    """Third stage: pixels and labels, decoded straight into the memory of the batch."""
    for number, samples in source:
        images = np.empty((len(samples), index.image_channels, index.image_size, index.image_size), dtype=np.uint8)
        for out, sample in zip(images, samples, strict=True):
            decode_into(out, sample)
        labels = torch.tensor([_label(sample, index.num_classes) for sample in samples], dtype=torch.int64)
        yield _Numbered(number, Batch(torch.from_numpy(images), labels, tuple(sample.key for sample in samples)))


def _label(sample: EncodedSample, num_classes: int | None) -> int:
    if num_classes is None:
        return 0
    if sample.label is None or sample.label >= num_classes:
        raise DataError(
            f"shard {sample.shard}, key {sample.key}: label is {sample.label}, the index has {num_classes} classes; "
            "prepare the data set again"
        )
    return sample.label


def _report_errors(source: Iterable[_Numbered]) -> Iterator[_Numbered]:
    """Last stage: send a data error as a value, since the DataLoader would wrap its message in a traceback."""
    try:
        yield from source
    except DataError as error:
        yield _Numbered(-1, None, str(error))
