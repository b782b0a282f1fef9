"""The stream of batches: its order, its contents, its processes and its errors."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from data.prepare.command import main as prepare
from data.shards.files import LocalShards
from data.shards.index import DataFile, ShardIndex, load_index
from data.storage.location import DataError
from data.stream.batches import Batch, BatchIterator, Loaded, LoaderError
from data.stream.partition import SampleOrder
from data.stream.pipeline import DataConfig, open_batches
from tests.data.conftest import open_shard
from tests.data.streams import keys, same, stream, take
from tests.launch import ROOT


def test_order_is_the_one_of_the_partition(prepared: ShardIndex) -> None:
    order = SampleOrder([shard.num_samples for shard in prepared.shards], seed=11, window_shards=3)
    expected: list[str] = []
    for shard, sample in zip(*order.locate(0, 48), strict=True):
        reader = open_shard(prepared, prepared.shards[shard])
        expected.append(reader.read(int(sample)).key)
        reader.close()
    assert [key for batch in take(12, stream(prepared)) for key in batch.keys] == expected


def test_batches_are_uint8_images_in_the_layout_of_the_decoders_with_int64_labels(prepared: ShardIndex) -> None:
    (batch,) = take(1, stream(prepared))
    assert (batch.images.shape, batch.images.dtype) == ((4, 3, 8, 8), torch.uint8)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert (batch.labels.shape, batch.labels.dtype) == ((4,), torch.int64)
    # The red channel is 200 times the label: see the class folder.
    assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.labels * 200)


def test_every_sample_comes_once_per_epoch(prepared: ShardIndex) -> None:
    batches = take(20, stream(prepared))
    for epoch in (batches[:10], batches[10:]):
        assert len({key for batch in epoch for key in batch.keys}) == 40
    assert keys(batches[:10]) != keys(batches[10:])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_of_any_world_size_share_the_same_batches(prepared: ShardIndex, world_size: int) -> None:
    whole = [key for batch in take(14, stream(prepared)) for key in batch.keys]
    share = 8 // world_size
    ranks = [
        take(7, stream(prepared, share=(rank * share, (rank + 1) * share), micro_batch_size=share))
        for rank in range(world_size)
    ]
    merged = [key for number in range(7) for rank in ranks for key in rank[number].keys]
    assert merged == whole


def test_last_micro_batch_of_a_share_that_does_not_divide_is_smaller(prepared: ShardIndex) -> None:
    whole = [key for batch in take(4, stream(prepared)) for key in batch.keys]
    cut = take(6, stream(prepared, micro_batch_size=3))
    assert [len(batch.keys) for batch in cut] == [3, 3, 2, 3, 3, 2]
    assert [key for batch in cut for key in batch.keys] == whole


@pytest.mark.parametrize("first_batch", [1, 4, 5, 6, 17])
def test_stream_opened_at_a_batch_equals_the_tail_of_the_whole(prepared: ShardIndex, first_batch: int) -> None:
    whole = take(2 * 20, stream(prepared))
    tail = take(6, stream(prepared, first_batch=first_batch))
    assert same(tail, whole[2 * first_batch : 2 * first_batch + 6])


@pytest.mark.parametrize("first_batch", [0, 3, 7])
def test_no_shard_is_opened_beyond_the_window_that_is_read_and_the_next_one(
    prepared: ShardIndex, monkeypatch: pytest.MonkeyPatch, first_batch: int
) -> None:
    opened: set[str] = set()
    open_local = LocalShards.open

    def opening(files: LocalShards, file: DataFile) -> int:
        opened.add(file.name)
        return open_local(files, file)

    monkeypatch.setattr(LocalShards, "open", opening)
    order = SampleOrder([5] * 8, seed=11, window_shards=2)
    config = DataConfig(path=prepared.location, image_size=8, loader_workers=0, shuffle_window_shards=2)
    with open_batches(
        config, prepared, seed=11, global_batch_size=4, share=(0, 4), micro_batch_size=4, first_batch=first_batch
    ) as batches:
        next(batches)
        needed = set(order.locate(4 * first_batch, 4 * first_batch + 4)[0].tolist())
        current, following = order.windows(4 * first_batch + 3)
    allowed = {file.name for number in {*needed, *current, *following} for file in prepared.shards[number].files}
    assert {file.name for number in needed for file in prepared.shards[number].files} <= opened <= allowed
    assert len(allowed) < 16


def test_both_versions_of_the_format_give_the_same_batches(prepared: ShardIndex, version_1: ShardIndex) -> None:
    assert all(shard.offsets for shard in prepared.shards)
    assert not any(shard.offsets for shard in version_1.shards)
    batches = [take(15, stream(index, first_batch=3)) for index in (prepared, version_1)]  # three epochs
    assert same(*batches)


def test_opening_at_a_batch_opens_only_the_shards_that_it_needs(own_copy: ShardIndex) -> None:
    order = SampleOrder([5] * 8, seed=11, window_shards=3)
    needed = set(order.locate(2 * 8, 3 * 8)[0].tolist())
    for number in set(range(8)) - needed:
        (own_copy.directory / own_copy.shards[number].name).unlink()
    assert len(needed) < 8
    assert len(take(2, stream(own_copy, first_batch=2))) == 2


def test_batch_larger_than_the_data_set_spans_epochs(own_copy: ShardIndex) -> None:
    config = DataConfig(path=str(own_copy.directory), image_size=8, loader_workers=0)
    with open_batches(
        config, own_copy, seed=0, global_batch_size=100, share=(0, 100), micro_batch_size=100, first_batch=0
    ) as batches:
        batch = next(batches)
    counts = [batch.keys.count(key) for key in set(batch.keys)]
    assert (len(counts), min(counts), max(counts)) == (40, 2, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_number_of_loader_processes_changes_nothing(prepared: ShardIndex) -> None:
    before = torch.get_rng_state()
    alone = take(15, stream(prepared, first_batch=3))
    one = take(15, stream(prepared, loader_workers=1, first_batch=3))
    four = take(15, stream(prepared, loader_workers=4, first_batch=3))
    assert same(one, alone)
    assert same(four, alone)
    # The models are initialized from this generator: reading data must not turn it on.
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("loader_workers", [1, 2, 4])
def test_rank_that_takes_long_to_copy_a_batch_still_finds_it_whole(
    prepared: ShardIndex, loader_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes have done by then all that they were asked for; micro-batches of 3, 3 and 2."""
    expected = take(10, stream(prepared, micro_batch_size=3))
    copied = BatchIterator._batch  # pyright: ignore[reportPrivateUsage]

    def copy_late(self: BatchIterator, loaded: Loaded) -> Batch:
        time.sleep(0.1)
        return copied(self, loaded)

    monkeypatch.setattr(BatchIterator, "_batch", copy_late)
    assert same(take(10, stream(prepared, micro_batch_size=3, loader_workers=loader_workers)), expected)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_processes_end_at_once_when_the_consumer_raises(prepared: ShardIndex) -> None:
    batches = stream(prepared, loader_workers=2)
    pids: tuple[int, ...] = ()
    began = 0.0
    with pytest.raises(RuntimeError, match="the step failed"), batches:
        next(batches)
        pids = batches.process_ids
        assert [alive(pid) for pid in pids] == [True, True]
        began = time.monotonic()
        raise RuntimeError("the step failed")
    assert [alive(pid) for pid in pids] == [False, False]
    assert time.monotonic() - began < 4
    batches.close()
    assert list(batches) == []


def test_processes_survive_the_signals_that_are_meant_for_the_rank(prepared: ShardIndex) -> None:
    expected = take(12, stream(prepared))
    with stream(prepared, loader_workers=2) as batches:
        found = [next(batches)]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            for pid in batches.process_ids:
                os.kill(pid, number)
        found += islice(batches, 11)
        assert same(found, expected)


# Unguarded on purpose: a loader process that imported the main module would run this again.
KILLED_RANK = """
import os, signal, sys
from data.stream.pipeline import DataConfig, open_batches
from data.shards.index import load_index
path = sys.argv[1]
config = DataConfig(path=path, image_size=8, loader_workers=2)
batches = open_batches(config, load_index(path), seed=0, global_batch_size=8, share=(0, 8),
                       micro_batch_size=8, first_batch=0)
next(batches)
print(*batches.process_ids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_processes_die_with_a_killed_rank_and_never_import_its_main_module(
    prepared: ShardIndex, tmp_path: Path
) -> None:
    script = tmp_path / "rank.py"
    script.write_text(KILLED_RANK)
    rank = subprocess.run(
        [sys.executable, str(script), str(prepared.directory)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert rank.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in rank.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "loader processes outlive their rank"
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_loader_process_is_named_within_seconds(prepared: ShardIndex) -> None:
    with stream(prepared, loader_workers=2) as batches:
        next(batches)
        victim = batches.process_ids[1]
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(
            LoaderError, match=rf"loader process {victim} ended with SIGKILL \(most likely for want of mem"
        ):
            list(islice(batches, 100))
        assert time.monotonic() - began < 10
        assert list(batches) == []


def test_labels_are_zeros_where_the_data_set_has_no_classes(prepared: ShardIndex) -> None:
    batches = take(4, stream(replace(prepared, num_classes=None)))
    assert all((batch.labels == 0).all() for batch in batches)


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_size", 0), ("image_channels", 9), ("loader_workers", -1), ("shuffle_window_shards", 0)],
)
def test_config_refuses_values_out_of_range(field: str, value: int) -> None:
    good = {"path": "somewhere", "image_size": 8}
    adapter = TypeAdapter(DataConfig)
    assert adapter.validate_json(json.dumps(good), strict=True) == DataConfig(path="somewhere", image_size=8)
    with pytest.raises(ValidationError, match=field):
        adapter.validate_json(json.dumps({**good, field: value}), strict=True)


@pytest.mark.gpu
@pytest.mark.parametrize("loader_workers", [0, 1])
def test_pinned_batches_are_page_locked_and_otherwise_the_same(prepared: ShardIndex, loader_workers: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("page-locked memory needs a CUDA device")
    config = DataConfig(path=str(prepared.directory), image_size=8, loader_workers=loader_workers)
    with open_batches(
        config,
        prepared,
        seed=0,
        global_batch_size=8,
        share=(0, 8),
        micro_batch_size=8,
        first_batch=0,
        pin_memory=True,
    ) as batches:
        batch = next(batches)
    assert batch.images.is_pinned()
    assert batch.labels.is_pinned()
    assert isinstance(batch.keys, tuple)
    assert all(isinstance(key, str) for key in batch.keys)


def test_config_that_does_not_fit_the_data_set_says_both_values(prepared: ShardIndex) -> None:
    numbers = {"seed": 0, "global_batch_size": 8, "share": (0, 8), "micro_batch_size": 8, "first_batch": 0}
    path = str(prepared.directory)
    with pytest.raises(DataError, match=r"data\.image_size is 16, but the data set at .* was prepared with 8: set"):
        open_batches(DataConfig(path=path, image_size=16), prepared, **numbers)
    with pytest.raises(DataError, match=r"data\.image_channels is 1, but .* prepared with 3"):
        open_batches(DataConfig(path=path, image_size=8, image_channels=1), prepared, **numbers)
    with pytest.raises(ValueError, match=r"share is \[0, 9\)"):
        open_batches(DataConfig(path=path, image_size=8), prepared, **{**numbers, "share": (0, 9)})


@pytest.mark.slow
def test_private_memory_of_a_loader_process_is_small_and_constant_over_three_epochs(
    tmp_path: Path, made_photographs: Path
) -> None:
    """At 256 px; the first epoch is left out, in which the process comes to its size."""
    out = tmp_path / "set"
    assert prepare([str(made_photographs), "--out", str(out), "--size", "256", "--shard-samples", "40"]) == 0
    index = load_index(out)
    numbers = {"seed": 0, "global_batch_size": 16, "share": (0, 16), "micro_batch_size": 16, "first_batch": 0}
    config = DataConfig(path=str(out), image_size=256, loader_workers=2, shuffle_window_shards=2)
    per_epoch = -(-index.num_samples // 16)
    used: list[int] = []
    with open_batches(config, index, **numbers) as batches:
        for _ in range(4):
            for _ in range(per_epoch):
                next(batches)
            used.append(max(psutil.Process(pid).memory_full_info().uss for pid in batches.process_ids))
    assert max(used) < 300e6
    assert max(used[1:]) - min(used[1:]) < 2e6
