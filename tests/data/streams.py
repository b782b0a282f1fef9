"""Opens the stream of a tiny prepared data set, and compares what comes."""

from itertools import islice

import torch

from data.shards.index import ShardIndex
from data.stream.batches import Batch, BatchIterator
from data.stream.pipeline import DataConfig, open_batches


def stream(
    index: ShardIndex,
    *,
    loader_workers: int = 0,
    share: tuple[int, int] = (0, 8),
    micro_batch_size: int = 4,
    first_batch: int = 0,
    max_bad_percent: float = 100,
) -> BatchIterator:
    config = DataConfig(
        path=index.location,
        image_size=8,
        loader_workers=loader_workers,
        shuffle_window_shards=3,
        max_bad_percent=max_bad_percent,
    )
    return open_batches(
        config,
        index,
        seed=11,
        global_batch_size=8,
        share=share,
        micro_batch_size=micro_batch_size,
        first_batch=first_batch,
    )


def take(count: int, batches: BatchIterator) -> list[Batch]:
    with batches:
        return list(islice(batches, count))


def keys(batches: list[Batch]) -> list[tuple[str, ...]]:
    return [batch.keys for batch in batches]


def same(one: list[Batch], two: list[Batch]) -> bool:
    return keys(one) == keys(two) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(one, two, strict=True)
    )
