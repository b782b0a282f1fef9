"""Random access gives what a sequential reader gives, and damage is named."""

import os
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from data.shards import reader as reader_module
from data.shards.index import Shard, ShardIndex
from data.shards.reader import BadSampleError, OpenShards
from data.storage.location import DataError
from tests.data.conftest import open_shard
from tests.data.damage import change_label


def test_random_access_equals_the_archive_read_from_front_to_back(prepared: ShardIndex) -> None:
    for shard in prepared.shards:
        with tarfile.open(prepared.directory / shard.name) as archive:
            members = {m.name: archive.extractfile(m).read() for m in archive}  # pyright: ignore
        reader = open_shard(prepared, shard)
        samples = [reader.read(number) for number in (4, 0, 3, 1, 2)]
        reader.close()
        assert {s.shard for s in samples} == {shard.name}
        assert len({s.key for s in samples}) == 5
        for sample in samples:
            assert sample.content == members[f"{sample.key}.{sample.extension}"]
            assert sample.label == int(members[f"{sample.key}.cls"])


def test_shards_read_by_webdataset_itself_hold_the_same_samples(prepared: ShardIndex) -> None:
    from webdataset.compat import WebDataset

    shard = prepared.shards[0]
    found = list(WebDataset(str(prepared.directory / shard.name), shardshuffle=False, empty_check=False))
    reader = open_shard(prepared, shard)
    assert [(s["__key__"], s["png"], int(s["cls"])) for s in found] == [
        (s.key, s.content, s.label) for s in map(reader.read, range(shard.num_samples))
    ]
    reader.close()


@pytest.mark.parametrize("place", [0, 10, 130, 260, 1024])
def test_flipped_byte_in_a_header_is_named(own_copy: ShardIndex, place: int) -> None:
    file = own_copy.directory / "00000.tar"
    content = bytearray(file.read_bytes())
    content[place] ^= 0x55
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"shard 00000\.tar at byte \d+: damaged"):
        open_shard(own_copy, own_copy.shards[0])


def test_shard_cut_off_within_a_sample_is_named(own_copy: ShardIndex) -> None:
    file = own_copy.directory / "00000.tar"
    os.truncate(file, 3 * 512)
    with pytest.raises(DataError, match=r"shard 00000\.tar"):
        open_shard(own_copy, own_copy.shards[0])


def test_wrong_number_of_samples_is_named(own_copy: ShardIndex) -> None:
    with pytest.raises(DataError, match="has 5 samples, the index says 6"):
        open_shard(own_copy, replace(own_copy.shards[0], num_samples=6))


def test_file_that_shrinks_while_it_is_open_is_named(own_copy: ShardIndex) -> None:
    reader = open_shard(own_copy, own_copy.shards[0])
    os.truncate(own_copy.directory / "00000.tar", 1000)
    with pytest.raises(DataError, match=r"shard 00000\.tar at byte"):
        reader.read(4)
    reader.close()


def test_failed_scan_leaves_no_file_open(own_copy: ShardIndex) -> None:
    before = os.listdir("/proc/self/fd")
    os.truncate(own_copy.directory / "00000.tar", 700)
    with pytest.raises(DataError):
        open_shard(own_copy, own_copy.shards[0])
    assert os.listdir("/proc/self/fd") == before


def test_label_that_is_no_number_is_the_fault_of_its_sample_alone(own_copy: ShardIndex) -> None:
    key = change_label(own_copy, 0, 4, b"x")
    reader = open_shard(own_copy, own_copy.shards[0])
    assert (reader.labels >= 0).tolist() == [True, True, True, True, False]
    assert len({reader.read(number).key for number in range(4)} - {key}) == 4
    with pytest.raises(BadSampleError, match=rf"shard 00000\.tar, key {key}: label b'x' is no number"):
        reader.read(4)
    reader.close()


def test_header_with_a_negative_size_does_not_turn_the_scan_back(own_copy: ShardIndex) -> None:
    file = own_copy.directory / "00000.tar"
    content = bytearray(file.read_bytes())
    content[124:135] = b"-0000002000"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"shard 00000\.tar at byte 0: damaged"):
        open_shard(own_copy, own_copy.shards[0])


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def open_file(index: ShardIndex) -> Callable[[Shard], int]:
    return lambda shard: os.open(index.directory / shard.name, os.O_RDONLY)


def test_no_more_files_are_open_than_may_be(prepared: ShardIndex) -> None:
    before = descriptors()
    readers = OpenShards(open_file(prepared), prepared.shards, capacity=3)
    first = [readers.read(shard, 1) for shard in range(8)]
    assert descriptors() == before + 3
    assert [readers.read(shard, 1) for shard in range(8)] == first
    readers.close()
    assert descriptors() == before


def test_files_of_other_windows_are_closed(prepared: ShardIndex) -> None:
    before = descriptors()
    readers = OpenShards(open_file(prepared), prepared.shards, capacity=8)
    for shard in range(5):
        readers.read(shard, 0)
    readers.keep([3, 4, 7])
    assert descriptors() == before + 2
    readers.close()


def scan_ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "scan-ahead"]


def test_more_samples_ahead_than_are_remembered_are_not_scanned_for_ever(
    prepared: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_MAX_TABLE_SAMPLES", 12)  # two shards and a bit
    opened: list[str] = []

    def count(shard: Shard) -> int:
        opened.append(shard.name)
        return os.open(prepared.directory / shard.name, os.O_RDONLY)

    readers = OpenShards(count, prepared.shards, capacity=8)
    readers.keep([], ahead=[5, 2, 7, 1])
    deadline = time.monotonic() + 5
    while scan_ahead_threads():
        assert time.monotonic() < deadline, f"still scanning after {len(opened)} shards"
        time.sleep(0.01)
    assert opened == ["00005.tar", "00002.tar"]
    readers.close()


def test_close_while_shards_are_scanned_ahead_leaves_no_file_open(prepared: ShardIndex) -> None:
    before = descriptors()
    for _ in range(20):
        readers = OpenShards(open_file(prepared), prepared.shards, capacity=8)
        readers.keep([], ahead=range(8))
        sample = readers.read(7, 2)
        readers.close()
        assert sample.shard == "00007.tar"
    deadline = time.monotonic() + 5
    while scan_ahead_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert descriptors() == before
