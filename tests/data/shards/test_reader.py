"""Random access gives what a sequential reader gives, and damage is named."""

import os
import tarfile

import pytest

from data.shards.files import LocalShards
from data.shards.index import ShardIndex
from data.shards.reader import OpenShards
from data.storage.location import DataError
from tests.data.conftest import open_shard


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


def test_file_that_shrinks_while_it_is_open_is_named(own_copy: ShardIndex) -> None:
    reader = open_shard(own_copy, own_copy.shards[0])
    os.truncate(own_copy.directory / "00000.tar", 1000)
    with pytest.raises(DataError, match=r"shard 00000\.tar at byte"):
        reader.read(4)
    reader.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_more_files_are_open_than_may_be(prepared: ShardIndex) -> None:
    before = descriptors()
    readers = OpenShards(LocalShards(prepared).open, prepared.shards, capacity=3)
    first = [readers.read(shard, 1) for shard in range(8)]
    assert descriptors() == before + 3
    assert [readers.read(shard, 1) for shard in range(8)] == first
    readers.close()
    assert descriptors() == before


def test_files_of_other_windows_are_closed(prepared: ShardIndex) -> None:
    before = descriptors()
    readers = OpenShards(LocalShards(prepared).open, prepared.shards, capacity=8)
    for shard in range(5):
        readers.read(shard, 0)
    readers.keep([3, 4, 7])
    assert descriptors() == before + 2
    readers.close()
