"""Counting of bad samples, and the memory that loader processes share with their rank."""

import logging
import os

import numpy as np
import pytest
import torch

from data import batches
from data.batches import BadSampleLimit, Batch, Replaced, Slots
from data.shards import DataError


def batch(size: int, *reasons: str) -> Batch:
    images = torch.zeros(size, 1, 4, 4, dtype=torch.uint8)
    return Batch(images, torch.zeros(size, dtype=torch.int64), (), tuple(Replaced("s.tar", "k", r) for r in reasons))


def test_bad_samples_up_to_the_share_of_every_epoch_begun_are_borne() -> None:
    limit = BadSampleLimit(max_percent=10, epoch_samples=20)
    limit.take(batch(4, "a", "b"))  # two of an epoch of twenty, though half of what was read
    limit.take(batch(16))
    limit.take(batch(4, "a", "b"))  # they come again in the second epoch
    with pytest.raises(DataError, match=r"5 of 28 samples .*, more than data\.max_bad_percent of 10 allows: a; b; c"):
        limit.take(batch(4, "c"))


def test_without_any_allowed_the_first_bad_sample_ends_the_run() -> None:
    limit = BadSampleLimit(max_percent=0, epoch_samples=1000)
    limit.take(batch(8))
    with pytest.raises(DataError, match=r"1 of 16 samples .*: a"):
        limit.take(batch(8, "a"))


def test_each_bad_sample_is_named_once_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    limit = BadSampleLimit(max_percent=100, epoch_samples=4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            limit.take(batch(4, "first is damaged", "second is damaged"))
    assert caplog.messages == [
        "first is damaged; key k is read in its place",
        "second is damaged; key k is read in its place",
    ]


def test_slots_of_processes_and_of_the_batches_under_way_do_not_overlap() -> None:
    slots = Slots(2, (3, 4, 4, 1))
    # Two are asked for in advance and one is being copied.
    for process in range(2):
        for turn in range(3):
            slots.of(process, turn)[...] = 10 * process + turn
    for process in range(2):
        for turn in range(3):
            assert np.all(slots.of(process, turn) == 10 * process + turn)
            assert np.shares_memory(slots.of(process, turn), slots.of(process, turn + 3))


def test_more_shared_memory_than_there_is_is_refused_before_it_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.statvfs(batches._SHARED_MEMORY)  # pyright: ignore[reportPrivateUsage]
    free = status.f_bavail * status.f_frsize
    with pytest.raises(
        DataError, match=r"need \d+ MB of shared memory, /dev/shm has \d+ MB left: set fewer data\.loader_"
    ):
        Slots(1, (free // 3 // 16 + 4096, 4, 4, 1))
