"""The stream of a rank: WebDataset stages in loader processes. Their number does not change the order."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, PositiveInt
from torch.utils.data import get_worker_info
from webdataset.pipeline import DataPipeline

from data.images.shown import MAX_CHANNELS
from data.shards.decode import decode_into
from data.shards.files import shard_files
from data.shards.index import ShardIndex
from data.shards.reader import BadSampleError, EncodedSample, OpenShards
from data.storage.location import DataError
from data.stream.batches import BadSampleLimit, BatchIterator, Loaded, Replaced, Slots
from data.stream.partition import SampleOrder, Span, micro_batch_spans

_MAX_OPEN_SHARDS = 256
"""Maximum of open files of a loader process, well below the usual limit of 1024."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set, and how it is read."""

    path: str
    """Folder or URL of a data set that `python -m data.prepare` made: tar shards and index.json."""
    image_size: Annotated[int, Field(gt=0, le=4096, description="one larger image would have more than 50 MB")]
    """Height and width of the images in pixels, as they were prepared."""
    image_channels: Annotated[int, Field(ge=1, le=MAX_CHANNELS)] = 3
    """Channels of the images, as they were prepared: 1 for grey, 3 for RGB, 2 for points of the plane; images of pairs
    have 1 to 8."""
    condition_channels: Annotated[int, Field(ge=0, le=MAX_CHANNELS)] = 0
    """Channels of the image that is given with each image, as the pairs were prepared: both networks see it, and the
    model translates it into images (`trainer.translate`). 0: none is given."""
    num_classes: Annotated[
        int, Field(ge=0, le=1_000_000, description="each class has an embedding in both networks")
    ] = 0
    """Number of classes, as they were prepared, for a class-conditional model: both networks see the label of each
    image. 0: labels are not used."""
    domain: Literal["pixels", "haar"] = "pixels"
    """What is diffused. `pixels`: the images themselves, as published. `haar`: their Haar wavelet coefficients, with
    four times the channels at half the size, as in WaveDiff: a step of the same networks costs about a quarter. Samples
    become images at the end. For 256 px and more."""
    horizontal_flip: bool = True
    """Mirror each image with probability 1/2. Which ones does not depend on the number of ranks."""
    loader_workers: Annotated[int, Field(ge=0, le=256, description="each is a process with its own memory")] = 2
    """Processes of each rank that read and decode images. 0: the rank's main process does it."""
    shuffle_window_shards: PositiveInt = 32
    """Number of shards whose images are shuffled together. More shards mix better, keep more files open, and delay the
    first batch when shards come over a network. Another number gives another order of the images."""
    verify: Literal["hash", "size"] = "hash"
    """What is checked before a start: the SHA-256 of each shard (`hash`; again only after the file has changed, or 30
    days later), or its size (`size`)."""
    max_bad_percent: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Percentage of the images that may be unreadable. Others replace them; with more the run stops."""
    cache_directory: str | None = None
    """Local folder for copies of shards that come from a URL, shared by all processes of a host. null: a folder of the
    user in /tmp. Nobody else may be able to write to it."""
    cache_gb: Annotated[float, Field(gt=0, le=1e9, description="no disk is larger than 10^18 bytes")] = 50.0
    """Largest size of cache_directory in 10^9 bytes. It must hold three times shuffle_window_shards shards."""


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
    """Stream a rank's part of the batches first_batch, first_batch + 1, ... endlessly.

    Args:
        config: expected form of the images, and how to read them.
        index: the prepared data set.
        seed: the order depends only on it, the index and the batch number.
        global_batch_size: samples of a batch over all ranks.
        share: [start, stop) within each global batch that this rank reads.
        micro_batch_size: samples of a micro-batch; the last one of a batch is smaller if it does not divide the share.
        first_batch: number of the batch to start with; only the shards of its window and the next one are opened.
        pin_memory: put batches in page-locked memory, so that copies to a GPU overlap with its work.

    Raises:
        DataError: the data set's form differs from the config; later, from the iterator: too many bad samples.
    """
    check_form(config, index)
    # Also built here, to refuse bad numbers before a process starts.
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
    shape = (micro_batch_size, *index.pixels_shape)
    slots = Slots(config.loader_workers, shape) if config.loader_workers else None
    dataset = DataPipeline(
        partial(_locate, spans=spans, order=order),
        partial(_load, config=config, index=index, order=order, slots=slots),
        _report_errors,
    )
    bad_samples = BadSampleLimit(max_percent=config.max_bad_percent, num_samples=index.num_samples)
    return BatchIterator(
        dataset,
        loader_workers=config.loader_workers,
        slots=slots,
        pin_memory=pin_memory,
        bad_samples=bad_samples,
    )


def check_form(config: DataConfig, index: ShardIndex) -> None:
    """Check that the form of a data set's images matches the config.

    Raises:
        DataError: names both forms, and says what to do.
    """
    names = (
        "image_size",
        "image_channels",
        "condition_channels",
        *(("num_classes",) if config.num_classes else ()),
    )
    for name in names:
        wanted, found = getattr(config, name), getattr(index, name) or 0
        if wanted != found:
            raise DataError(
                f"data.{name} is {wanted}, but the data set at {index.shown_location} was prepared with {found}: "
                f"set data.{name} to {found} or prepare the data again"
            )


class _Located(NamedTuple):
    span: Span
    shards: list[int]
    samples: list[int]


def _locate(*, spans: Callable[..., Iterator[Span]], order: Callable[[], SampleOrder]) -> Iterator[_Located]:
    """First stage: locate the samples of this loader process's micro-batches."""
    process = get_worker_info()
    sample_order = order()
    mine = spans() if process is None else spans(process=process.id, num_processes=process.num_workers)
    for span in mine:
        shards, samples = sample_order.locate(span.start, span.stop)
        yield _Located(span, shards.tolist(), samples.tolist())


def _load(
    source: Iterable[_Located],
    *,
    config: DataConfig,
    index: ShardIndex,
    order: Callable[[], SampleOrder],
    slots: Slots | None,
) -> Iterator[Loaded]:
    """Second stage: decode pixels directly into the batch's memory, and read labels."""
    process = get_worker_info()
    sample_order = order()
    files = shard_files(index, cache_directory=config.cache_directory, cache_gb=config.cache_gb)
    readers = OpenShards(files.open, index.shards, _MAX_OPEN_SHARDS)
    windows: tuple[list[int], list[int]] | None = None
    try:
        for turn, (span, shards, samples) in enumerate(source):
            if windows != (windows := sample_order.windows(span.stop - 1)):
                # A micro-batch may span two windows.
                needed = list(dict.fromkeys([*shards, *windows[0], *windows[1]]))
                readers.keep({*shards, *windows[0]})
                files.prefetch([index.shards[number] for number in needed])
            if slots is None or process is None:
                pixels = np.empty((len(shards), *index.pixels_shape), dtype=np.uint8)
            else:
                pixels = slots.of(process.id, turn)
            found = [
                decode_or_replace(out, readers, index, shard, sample)
                for out, shard, sample in zip(pixels, shards, samples, strict=False)
            ]
            yield Loaded(
                span.number,
                pixels if slots is None else len(shards),
                tuple(label for label, _, _ in found),
                tuple(key for _, key, _ in found),
                tuple(replaced for _, _, replaced in found if replaced),
            )
    finally:
        readers.close()
        files.close()


def decode_or_replace(
    out: np.ndarray, readers: OpenShards, index: ShardIndex, shard: int, sample: int
) -> tuple[int, str, Replaced | None]:
    """Decode a sample, or if it is bad the next good one of its shard, the same for any rank or process.

    Raises:
        DataError: the shard cannot be read, or has no good sample.
    """
    size = index.shards[shard].num_samples
    first_error: BadSampleError | None = None
    for offset in range(size):
        try:
            found = readers.read(shard, (sample + offset) % size)
            decode_into(out, found)
            label = _label(found, index.num_classes)
        except BadSampleError as error:
            first_error = first_error or error
            continue
        return label, found.key, first_error and Replaced(found.shard, found.key, str(first_error))
    raise DataError(f"{first_error}; none of the {size} samples of this shard can be used")


def _label(sample: EncodedSample, num_classes: int | None) -> int:
    if num_classes is None:
        return 0
    if sample.label is None or sample.label >= num_classes:
        raise BadSampleError(
            f"shard {sample.shard}, key {sample.key}: label is {sample.label}, the index has {num_classes} classes; "
            "prepare the data set again"
        )
    return sample.label


def _report_errors(source: Iterable[Loaded]) -> Iterator[Loaded]:
    """Last stage: send a data error as a value, since the DataLoader would wrap an exception in a traceback."""
    try:
        yield from source
    except DataError as error:
        yield Loaded(-1, 0, error=str(error))
