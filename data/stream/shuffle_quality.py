"""Shuffle quality of a window: the distance in an epoch between samples that are neighbours on disk."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.stream.partition import SampleOrder


@dataclass(frozen=True, kw_only=True)
class ShuffleQuality:
    """Distances in one epoch between consecutive samples of a shard."""

    mean_distance: float
    """Mean distance in samples."""
    full_permutation: float
    """Its expected value for a permutation of the whole epoch: (N + 1) / 3."""
    same_batch: float
    """Share of neighbours in the same batch."""
    same_batch_full_permutation: float
    """Its expected value for a permutation of the whole epoch."""

    @property
    def ratio(self) -> float:
        """Mean distance relative to a full permutation; 1: perfect shuffle, 3 / (N + 1): no shuffle."""
        return self.mean_distance / self.full_permutation


def shuffle_quality(
    shard_sizes: Sequence[int], *, window_shards: int, batch_size: int, seed: int = 0, epoch: int = 0
) -> ShuffleQuality:
    """Measure the order of one epoch.

    Args:
        shard_sizes: samples of each shard; more than one sample in total.
        window_shards: shards whose samples are mixed.
        batch_size: samples of a global batch.
        seed: seed of the order.
        epoch: epoch to measure.
    """
    order = SampleOrder(shard_sizes, seed=seed, window_shards=window_shards)
    num_samples = order.num_samples
    shards, samples = order.locate(epoch * num_samples, (epoch + 1) * num_samples)
    starts = np.concatenate([[0], np.cumsum(shard_sizes)])
    place = np.empty(num_samples, dtype=np.int64)
    place[starts[shards] + samples] = np.arange(num_samples)
    neighbours = np.ones(num_samples - 1, dtype=bool)
    neighbours[starts[1:-1] - 1] = False  # the last sample of a shard and the first of the next one
    if not neighbours.any():
        raise ValueError("no shard has two samples: there are no neighbours")
    distance = np.abs(np.diff(place))[neighbours]
    batch = place // batch_size
    # Fraction of position pairs within one batch.
    in_batch = np.bincount(batch).astype(np.float64)
    pairs = (in_batch * (in_batch - 1)).sum() / (num_samples * (num_samples - 1.0))
    return ShuffleQuality(
        mean_distance=float(distance.mean()),
        full_permutation=(num_samples + 1) / 3,
        same_batch=float((np.diff(batch) == 0)[neighbours].mean()),
        same_batch_full_permutation=float(pairs),
    )
