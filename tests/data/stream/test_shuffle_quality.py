"""The measure of the shuffle: right where the answer is known, and good enough for the default settings."""

import pytest

from data.stream.pipeline import DataConfig
from data.stream.shuffle_quality import ShuffleQuality, shuffle_quality


def test_one_window_over_everything_is_a_full_permutation() -> None:
    found = shuffle_quality([500] * 8, window_shards=8, batch_size=32)
    # The mean of 4,000 distances of deviation N / sqrt(18) lies within five standard errors.
    assert found.ratio == pytest.approx(1, abs=5 * 0.707 / 4000**0.5)
    assert found.same_batch == pytest.approx(found.same_batch_full_permutation, abs=0.007)


def test_windows_keep_neighbours_as_near_as_a_permutation_of_one_window() -> None:
    found = shuffle_quality([500] * 12, window_shards=3, batch_size=32)
    assert found.mean_distance == pytest.approx(1501 / 3, rel=0.05)
    assert found.full_permutation == pytest.approx(6001 / 3)


def test_neighbours_are_counted_within_shards_only() -> None:
    # Two samples a shard, one shard a window: each pair of neighbours is one apart, whatever the order of the shards.
    found = shuffle_quality([2] * 50, window_shards=1, batch_size=2)
    assert found.mean_distance == 1
    assert found.same_batch == 1


def test_shards_of_one_sample_have_no_neighbours() -> None:
    with pytest.raises(ValueError, match="no shard has two samples"):
        shuffle_quality([1, 1, 1], window_shards=2, batch_size=2)


SHARD_SAMPLES = 4096
"""What `data.prepare` makes without --shard-samples."""


def at_defaults(num_samples: int, batch_size: int) -> ShuffleQuality:
    full, rest = divmod(num_samples, SHARD_SAMPLES)
    sizes = [SHARD_SAMPLES] * full + [rest]
    return shuffle_quality(sizes, window_shards=DataConfig.shuffle_window_shards, batch_size=batch_size)


@pytest.mark.parametrize(("num_samples", "batch_size"), [(50_000, 256), (60_000, 256), (30_000, 32), (120_000, 64)])
def test_default_window_permutes_the_whole_of_the_data_sets_of_the_configs(num_samples: int, batch_size: int) -> None:
    found = at_defaults(num_samples, batch_size)
    assert found.ratio == pytest.approx(1, abs=0.02)
    assert found.same_batch == pytest.approx(found.same_batch_full_permutation, rel=0.2)


def test_default_window_puts_neighbours_of_a_large_data_set_forty_thousand_samples_apart() -> None:
    found = at_defaults(1_281_167, 256)
    assert found.mean_distance > 40_000
    assert found.same_batch < 0.003
