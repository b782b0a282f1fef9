"""Theorems about the order of samples."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.stream.partition import SampleOrder, micro_batch_spans, permutation

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**64 - 1)
WINDOWS = st.integers(1, 14)


def pairs(order: SampleOrder, start: int, stop: int) -> list[tuple[int, int]]:
    shards, samples = order.locate(start, stop)
    return list(zip(shards.tolist(), samples.tolist(), strict=True))


@given(SIZES, SEEDS, WINDOWS, st.integers(0, 5))
def test_every_epoch_holds_every_sample_once(sizes: list[int], seed: int, window: int, epoch: int) -> None:
    order = SampleOrder(sizes, seed=seed, window_shards=window)
    n = order.num_samples
    everything = [(shard, sample) for shard, size in enumerate(sizes) for sample in range(size)]
    assert sorted(pairs(order, epoch * n, (epoch + 1) * n)) == everything


@example(sizes=[9], seed=0, window=1, start=4, first=80, second=1)
@example(sizes=[1], seed=0, window=1, start=0, first=3, second=0)
@example(sizes=[1] * 12, seed=0, window=3, start=11, first=2, second=30)
@given(SIZES, SEEDS, WINDOWS, st.integers(0, 300), st.integers(0, 80), st.integers(0, 80))
def test_any_cut_of_the_stream_gives_the_same_stream(
    sizes: list[int], seed: int, window: int, start: int, first: int, second: int
) -> None:
    middle, stop = start + first, start + first + second
    whole = pairs(SampleOrder(sizes, seed=seed, window_shards=window), start, stop)
    order = SampleOrder(sizes, seed=seed, window_shards=window)
    # The later part first: no answer may depend on what was asked before.
    tail = pairs(order, middle, stop)
    assert pairs(order, start, middle) + tail == whole


@given(SIZES, SEEDS, WINDOWS)
def test_no_more_shards_are_begun_and_unfinished_than_a_window_holds(sizes: list[int], seed: int, window: int) -> None:
    order = SampleOrder(sizes, seed=seed, window_shards=window)
    unread: dict[int, int] = {}
    for shard, _ in pairs(order, 0, order.num_samples):
        unread[shard] = unread.get(shard, sizes[shard]) - 1
        assert sum(count > 0 for count in unread.values()) <= window


@given(SIZES, SEEDS, WINDOWS)
def test_windows_follow_one_another_and_hold_what_is_read_in_them(sizes: list[int], seed: int, window: int) -> None:
    order = SampleOrder(sizes, seed=seed, window_shards=window)
    start = 0
    while start < 2 * order.num_samples:
        current, following = order.windows(start)
        stop = start + sum(sizes[shard] for shard in current)
        assert 1 <= len(current) <= window
        assert set(order.locate(start, stop)[0].tolist()) == set(current)
        assert all(order.windows(position) == (current, following) for position in range(start, stop))
        assert order.windows(stop)[0] == following
        start = stop
    assert start == 2 * order.num_samples


ONE_SHARD = {"sizes": [9], "window": 1}
FEWER_THAN_A_BATCH = {"sizes": [2, 1], "window": 2}
SHARDS_OF_ONE_SAMPLE = {"sizes": [1] * 12, "window": 3}


@example(**ONE_SHARD, seed=0, world_size=8, rank_batch_size=2, micro_batch_size=2, num_processes=4, first_batch=5)
@example(**ONE_SHARD, seed=1, world_size=1, rank_batch_size=5, micro_batch_size=3, num_processes=1, first_batch=0)
@example(
    **FEWER_THAN_A_BATCH, seed=2, world_size=4, rank_batch_size=5, micro_batch_size=2, num_processes=4, first_batch=3
)
@example(
    **SHARDS_OF_ONE_SAMPLE, seed=3, world_size=2, rank_batch_size=4, micro_batch_size=1, num_processes=4, first_batch=7
)
@given(
    SIZES,
    SEEDS,
    WINDOWS,
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 40),
)
def test_any_ranks_and_processes_from_any_batch_on_read_the_one_stream(
    sizes: list[int],
    seed: int,
    window: int,
    world_size: int,
    rank_batch_size: int,
    micro_batch_size: int,
    num_processes: int,
    first_batch: int,
) -> None:
    batch_size, num_batches = world_size * rank_batch_size, 3
    per_batch = -(-rank_batch_size // micro_batch_size)
    found: dict[int, list[list[tuple[int, int]]]] = {}
    for rank in range(world_size):
        share = (rank * rank_batch_size, (rank + 1) * rank_batch_size)
        for process in range(num_processes):
            order = SampleOrder(sizes, seed=seed, window_shards=window)
            spans = micro_batch_spans(
                global_batch_size=batch_size,
                share=share,
                micro_batch_size=micro_batch_size,
                first_batch=first_batch,
                process=process,
                num_processes=num_processes,
            )
            for span in spans:
                if span.number >= num_batches * per_batch:
                    break
                batch, part = divmod(span.number, per_batch)
                found.setdefault((batch * world_size + rank) * per_batch + part, []).append(
                    pairs(order, span.start, span.stop)
                )
    assert all(len(readings) == 1 for readings in found.values())
    merged = [pair for place in sorted(found) for pair in found[place][0]]
    whole = SampleOrder(sizes, seed=seed, window_shards=window)
    assert merged == pairs(whole, first_batch * batch_size, (first_batch + num_batches) * batch_size)


def test_order_is_the_recorded_one() -> None:
    # A changed order would break the resumption of every run that exists.
    order = SampleOrder([3, 1, 4, 2], seed=7, window_shards=2)
    first_epoch = [(3, 1), (3, 0), (1, 0), (2, 0), (0, 0), (2, 1), (2, 3), (2, 2), (0, 2), (0, 1)]
    assert pairs(order, 0, 12) == [*first_epoch, (0, 0), (1, 0)]
    assert permutation(6, seed=2**64 - 1, purpose=1, epoch=3, window=5).tolist() == [2, 0, 4, 1, 5, 3]


def test_epochs_seeds_and_windows_are_ordered_differently() -> None:
    base = permutation(50, seed=1, purpose=0, epoch=0, window=0).tolist()
    assert permutation(50, seed=2, purpose=0, epoch=0, window=0).tolist() != base
    assert permutation(50, seed=1, purpose=1, epoch=0, window=0).tolist() != base
    assert permutation(50, seed=1, purpose=0, epoch=1, window=0).tolist() != base
    assert permutation(50, seed=1, purpose=0, epoch=0, window=1).tolist() != base


def test_permutation_is_uniform() -> None:
    # 6000 draws of a permutation of 3: each of 6 has 1000 +- 5 standard deviations of 29.
    draws = [tuple(permutation(3, seed=0, purpose=0, epoch=e, window=0).tolist()) for e in range(6000)]
    _, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 1000 - 145
    assert counts.max() < 1000 + 145


@given(st.integers(1, 24), st.integers(1, 5), st.integers(0, 1000), st.integers(1, 5), st.data())
def test_loader_processes_taken_in_turn_give_the_rank_its_order(
    global_batch_size: int, micro_batch_size: int, first_batch: int, num_processes: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, global_batch_size - 1))
    stop = data.draw(st.integers(start + 1, global_batch_size))

    def spans(process: int, of: int):
        return micro_batch_spans(
            global_batch_size=global_batch_size,
            share=(start, stop),
            micro_batch_size=micro_batch_size,
            first_batch=first_batch,
            process=process,
            num_processes=of,
        )

    processes = [spans(process, num_processes) for process in range(num_processes)]
    merged = [next(processes[turn % num_processes]) for turn in range(40)]
    assert merged == list(islice(spans(0, 1), 40))
    assert [span.number for span in merged] == list(range(40))
    per_batch = -(-(stop - start) // micro_batch_size)
    for batch in range(40 // per_batch):
        covered = [p for s in merged[batch * per_batch : (batch + 1) * per_batch] for p in range(s.start, s.stop)]
        offset = (first_batch + batch) * global_batch_size
        assert covered == list(range(offset + start, offset + stop))


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_together_read_the_global_batch(world_size: int) -> None:
    share = 16 // world_size
    positions: list[int] = []
    for rank in range(world_size):
        spans = micro_batch_spans(
            global_batch_size=16, share=(rank * share, (rank + 1) * share), micro_batch_size=2, first_batch=5
        )
        positions += [p for span in islice(spans, share // 2) for p in range(span.start, span.stop)]
    assert positions == list(range(80, 96))


def test_bad_numbers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="seed is -1: allowed are 0 to"):
        SampleOrder([1], seed=-1, window_shards=1)
    with pytest.raises(ValueError, match="at least one shard of at least one sample"):
        SampleOrder([3, 0], seed=0, window_shards=1)
    with pytest.raises(ValueError, match="window_shards is 0"):
        SampleOrder([3], seed=0, window_shards=0)
    good = {"global_batch_size": 8, "micro_batch_size": 2, "first_batch": 0}
    with pytest.raises(ValueError, match=r"share is \[4, 9\)"):
        micro_batch_spans(share=(4, 9), **good)
    with pytest.raises(ValueError, match="micro_batch_size is 0"):
        micro_batch_spans(share=(0, 8), **{**good, "micro_batch_size": 0})
    with pytest.raises(ValueError, match="first_batch is -2"):
        micro_batch_spans(share=(0, 8), **{**good, "first_batch": -2})
