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

from data.batches import Batch, BatchIterator, LoaderError
from data.partition import SampleOrder
from data.pipeline import DataConfig, open_batches
from data.prepare import main as prepare
from data.shards import DataError, ShardIndex, load_index
from tests.data.conftest import open_shard

ROOT = Path(__file__).resolve().parents[2]


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
from data.pipeline import DataConfig, open_batches
from data.shards import load_index
path = sys.argv[1]
config = DataConfig(path=path, image_size=8, loader_workers=2)
batches = open_batches(config, load_index(path), seed=0, global_batch_size=8, share=(0, 8),
                       micro_batch_size=8, first_batch=0)
next(batches)
print(*batches.process_ids, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


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


def damage(index: ShardIndex, *places: tuple[int, int]) -> list[str]:
    """Overwrite the images at (shard, sample); returns their keys."""
    keys = []
    for shard, number in places:
        reader = open_shard(index, index.shards[shard])
        sample = reader.read(number)
        reader.close()
        file = index.directory / sample.shard
        content = file.read_bytes()
        # The key makes the place unique: the header comes a block before the image.
        header = content.index(f"{sample.key}.png".encode())
        image = content.index(sample.content[:60], header)
        file.write_bytes(content[:image] + bytes(60) + content[image + 60 :])
        keys.append(sample.key)
    return keys


def key_of(index: ShardIndex, shard: int, sample: int) -> str:
    reader = open_shard(index, index.shards[shard])
    try:
        return reader.read(sample).key
    finally:
        reader.close()


@pytest.mark.parametrize("loader_workers", [0, 2])
def test_bad_sample_is_replaced_by_the_next_good_one_of_its_shard_and_named(
    own_copy: ShardIndex, loader_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    good = take(20, stream(own_copy))
    first, second, last = damage(own_copy, (4, 2), (4, 3), (6, 4))
    stands_in = {first: key_of(own_copy, 4, 4), second: key_of(own_copy, 4, 4), last: key_of(own_copy, 6, 0)}
    caplog.clear()
    found = take(20, stream(own_copy, loader_workers=loader_workers))
    assert keys(found) == [tuple(stands_in.get(key, key) for key in batch.keys) for batch in good]
    pixels = {key: image for batch in good for key, image in zip(batch.keys, batch.images, strict=True)}
    for batch in found:
        assert all(torch.equal(image, pixels[key]) for key, image in zip(batch.keys, batch.images, strict=True))
    # Each is met once in each of the two epochs, and named once in the log.
    reasons = [replaced.reason for batch in found for replaced in batch.replaced]
    assert len(reasons) == 6
    for shard, key in ((4, first), (4, second), (6, last)):
        words = f"shard 0000{shard}.tar, key {key}: the image is damaged"
        assert sum(words in reason for reason in reasons) == 2
        assert sum(words in line and f"key {stands_in[key]} is read" in line for line in caplog.messages) == 1


def test_replacements_are_the_same_from_any_batch_and_for_any_share(own_copy: ShardIndex) -> None:
    damage(own_copy, (0, 0), (0, 1), (3, 4))
    whole = take(24, stream(own_copy))
    assert same(take(10, stream(own_copy, first_batch=7)), whole[14:])
    halves = [take(12, stream(own_copy, share=share)) for share in ((0, 4), (4, 8))]
    assert [key for pair in zip(*halves, strict=True) for half in pair for key in half.keys] == [
        key for batch in whole for key in batch.keys
    ]


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_too_many_bad_samples_end_the_run_with_their_names(own_copy: ShardIndex, loader_workers: int) -> None:
    bad = damage(own_copy, (1, 0), (5, 3))
    # Two of forty are five per cent of an epoch.
    assert len(take(30, stream(own_copy, loader_workers=loader_workers, max_bad_percent=5))) == 30
    with stream(own_copy, loader_workers=loader_workers, max_bad_percent=4) as batches:
        with pytest.raises(DataError) as caught:
            list(islice(batches, 30))
        assert "2 of " in str(caught.value)
        assert "more than data.max_bad_percent of 4 allows" in str(caught.value)
        assert all(key in str(caught.value) for key in bad)
        # It is over: a run must not go on.
        assert list(batches) == []


def test_shard_without_any_good_sample_is_an_error_in_its_place(own_copy: ShardIndex) -> None:
    good = take(10, stream(own_copy))
    whole_shard = damage(own_copy, *((2, number) for number in range(5)))
    place = next(number for number, batch in enumerate(good) if set(batch.keys) & set(whole_shard))
    with stream(own_copy) as batches:
        assert same(list(islice(batches, place)), good[:place])
        with pytest.raises(
            DataError, match=r"shard 00002\.tar, key .*; none of the 5 samples of this shard can be used"
        ):
            next(batches)


def test_label_out_of_range_is_named(own_copy: ShardIndex) -> None:
    with pytest.raises(DataError, match=r"shard \d+\.tar, key .*: label is 1, the index has 1 classes"):
        take(9, stream(replace(own_copy, num_classes=1)))
    batches = take(4, stream(replace(own_copy, num_classes=None)))
    assert all((batch.labels == 0).all() for batch in batches)


@pytest.mark.parametrize(
    ("field", "value"),
    [("image_size", 3), ("image_channels", 2), ("loader_workers", -1), ("shuffle_window_shards", 0)],
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
