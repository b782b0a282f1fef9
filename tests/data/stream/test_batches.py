"""Counting of bad samples, and the memory that loader processes share with their rank."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data.storage.location import DataError
from data.stream import batches
from data.stream.batches import BadSampleLimit, Slots
from data.stream.partition import SampleOrder
from tests.launch import ROOT


def test_bad_samples_up_to_the_share_of_the_data_set_are_borne_however_often_they_are_met() -> None:
    limit = BadSampleLimit(max_percent=10, num_samples=20)
    assert limit.take(["a", "b", "a"]) == ["a", "b"]
    for _ in range(100):
        assert limit.take(["b", "a"]) == []
    with pytest.raises(
        DataError, match=r"at least 3 of 20 samples .*, more than data\.max_bad_percent of 10 allows: a; b; c"
    ):
        limit.take(["c"])


def test_without_any_allowed_the_first_bad_sample_ends_the_run() -> None:
    limit = BadSampleLimit(max_percent=0, num_samples=1000)
    assert limit.take([]) == []
    with pytest.raises(DataError, match=r"1 of 1000 samples .*: a"):
        limit.take(["a"])


@pytest.mark.parametrize("world_size", [1, 2, 8, 32])
def test_share_of_bad_samples_below_the_limit_ends_the_run_of_no_rank_whatever_the_number_of_ranks(
    world_size: int,
) -> None:
    # 0.9% of bad ones; each rank meets more and fewer of them from epoch to epoch.
    order, batch_size = SampleOrder([400] * 5, seed=3, window_shards=5), 64
    bad = set(range(0, 2000, 111))
    limits = [BadSampleLimit(max_percent=1, num_samples=2000) for _ in range(world_size)]
    met: set[str] = set()
    for number in range(200):
        places = np.stack(order.locate(number * batch_size, (number + 1) * batch_size), axis=1) @ [400, 1]
        for limit, share in zip(limits, np.split(places, world_size), strict=True):
            met.update(limit.take(str(place) for place in share.tolist() if place in bad))
    assert met == set(map(str, bad)), "no rank was ended, and all bad ones came"


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
        DataError, match=r"need \d+ [kM]B of shared memory, /dev/shm has \d+ [kM]B left: set fewer data\.loader_"
    ):
        Slots(1, (free // 3 // 16 + 4096, 4, 4, 1))


TAKEN_MEANWHILE = """
from data.stream.batches import Slots
from data.storage.location import DataError
Slots._refuse_too_much = lambda *_: None
try:
    Slots(2, (64, 64, 64, 3))
except DataError as error:
    print(error)
"""


@pytest.mark.slow
def test_shared_memory_that_another_rank_took_meanwhile_is_refused_in_the_same_words() -> None:
    # Every rank of a host looks before any of them has taken its part. Here in a namespace with 2 MB.
    small = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=2m tmpfs /dev/shm"
    if shutil.which("unshare") is None or subprocess.run([*small, mount], capture_output=True).returncode != 0:
        pytest.skip("a small /dev/shm needs user namespaces")
    done = subprocess.run(
        [*small, f'{mount} && exec "$0" -c "$1"', sys.executable, TAKEN_MEANWHILE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith(
        "the loader processes need 5 MB of shared memory, /dev/shm has 2 MB left: set fewer data.loader_workers"
    ), done.stderr
