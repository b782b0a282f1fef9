"""Offsets say what a scan of the shard finds; what is wrong with either is named."""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from data.shards import reader as reader_module
from data.shards.files import LocalShards
from data.shards.index import DataFile, ShardIndex
from data.shards.offsets import read_offsets
from data.shards.reader import BadSampleError, OpenShards, ShardReader
from data.storage.location import DataError
from tests.data.conftest import open_shard
from tests.data.damage import change_label


def open_files(folder: Path) -> list[str]:
    """Files of a folder that this process has open."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return [link for link in links if link.startswith(f"{folder}/")]


@pytest.mark.parametrize("place", [0, 10, 130, 260, 1024])
def test_flipped_byte_in_a_header_is_named(version_1: ShardIndex, place: int) -> None:
    file = version_1.directory / "00000.tar"
    content = bytearray(file.read_bytes())
    content[place] ^= 0x55
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"shard 00000\.tar at byte \d+: damaged"):
        open_shard(version_1, version_1.shards[0])


def test_shard_cut_off_within_a_sample_is_named(version_1: ShardIndex) -> None:
    file = version_1.directory / "00000.tar"
    os.truncate(file, 3 * 512)
    with pytest.raises(DataError, match=r"shard 00000\.tar"):
        open_shard(version_1, version_1.shards[0])


def test_wrong_number_of_samples_is_named(version_1: ShardIndex) -> None:
    with pytest.raises(DataError, match="has 5 samples, the index says 6"):
        open_shard(version_1, replace(version_1.shards[0], num_samples=6))


def test_failed_scan_leaves_no_file_open(version_1: ShardIndex) -> None:
    os.truncate(version_1.directory / "00000.tar", 700)
    with pytest.raises(DataError):
        open_shard(version_1, version_1.shards[0])
    assert open_files(version_1.directory) == []


def test_label_that_is_no_number_is_the_fault_of_its_sample_alone(version_1: ShardIndex) -> None:
    key = change_label(version_1, 0, 4, b"x")
    reader = open_shard(version_1, version_1.shards[0])
    assert (reader.labels >= 0).tolist() == [True, True, True, True, False]
    assert len({reader.read(number).key for number in range(4)} - {key}) == 4
    with pytest.raises(BadSampleError, match=rf"shard 00000\.tar, key {key}: label b'x' is no number"):
        reader.read(4)
    reader.close()


def test_header_with_a_negative_size_does_not_turn_the_scan_back(version_1: ShardIndex) -> None:
    file = version_1.directory / "00000.tar"
    content = bytearray(file.read_bytes())
    content[124:135] = b"-0000002000"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"shard 00000\.tar at byte 0: damaged"):
        open_shard(version_1, version_1.shards[0])


@dataclass
class Reads:
    """What was read of the files of a data set."""

    opened: list[str] = field(default_factory=list)
    num_bytes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Counts files opened, and calls and bytes by file name."""
    counts = Reads()
    pread, open_local = os.pread, LocalShards.open

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        content = pread(descriptor, count, offset)
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        counts.num_bytes[name] += len(content)
        counts.calls[name] += 1
        return content

    def opening(files: LocalShards, file: DataFile) -> int:
        counts.opened.append(file.name)
        return open_local(files, file)

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(LocalShards, "open", opening)
    return counts


def test_offsets_are_what_a_scan_finds(prepared: ShardIndex, version_1: ShardIndex) -> None:
    for shard, old in zip(prepared.shards, version_1.shards, strict=True):
        table = read_offsets(shard, LocalShards(prepared).open)
        with closing(open_shard(version_1, old)) as reader:
            assert np.array_equal(table, reader.table)
        assert table[:, 2].min() > 0


def test_reading_a_sample_with_offsets_reads_nothing_else_of_its_shard(prepared: ShardIndex, reads: Reads) -> None:
    shard = prepared.shards[2]
    with closing(open_shard(prepared, shard)) as reader:
        assert reads.opened == ["00002.tar", "00002.offsets"]
        assert (reads.num_bytes, reads.calls) == ({"00002.offsets": 60}, {"00002.offsets": 1})
        sample = reader.read(3)
    assert reads.calls["00002.tar"] == 1
    assert reads.num_bytes["00002.tar"] == 512 + len(sample.content)


def test_reading_a_sample_without_offsets_reads_all_headers_once(version_1: ShardIndex, reads: Reads) -> None:
    readers = OpenShards(LocalShards(version_1).open, version_1.shards, capacity=1)
    readers.read(2, 3)
    # Ten members and the end of the archive; then the sample.
    assert reads.calls == {"00002.tar": 12}
    readers.read(5, 0)
    readers.read(2, 4)
    readers.close()
    assert reads.opened == ["00002.tar", "00005.tar", "00002.tar"]
    assert reads.calls["00002.tar"] == 13


def test_offsets_are_read_once_though_shards_are_opened_again(prepared: ShardIndex, reads: Reads) -> None:
    readers = OpenShards(LocalShards(prepared).open, prepared.shards, capacity=1)
    for shard in (2, 5, 2, 5):
        readers.read(shard, 0)
    readers.close()
    assert reads.opened == ["00002.tar", "00002.offsets", "00005.tar", "00005.offsets", "00002.tar", "00005.tar"]


def test_more_offsets_than_are_remembered_are_read_again(
    prepared: ShardIndex, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_MAX_TABLE_SAMPLES", 12)  # two shards and a bit
    readers = OpenShards(LocalShards(prepared).open, prepared.shards, capacity=1)
    for shard in (0, 1, 2, 1, 0):
        readers.read(shard, 0)
    readers.close()
    assert [name for name in reads.opened if name.endswith(".offsets")] == [
        *("00000.offsets", "00001.offsets", "00002.offsets", "00000.offsets")
    ]


def cut(content: bytes) -> bytes:
    return content[:-12]


def lengthened(content: bytes) -> bytes:
    return content + bytes(12)


def flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.mark.parametrize("damage", [cut, lengthened, flipped, lambda _: b""])
def test_damaged_offsets_are_named_with_their_shard_and_leave_no_file_open(
    own_copy: ShardIndex, damage: Callable[[bytes], bytes]
) -> None:
    file = own_copy.directory / "00000.offsets"
    file.write_bytes(damage(file.read_bytes()))
    told = r"offsets 00000\.offsets of shard 00000\.tar: the file is damaged: its SHA-256 is .*; copy it again"
    with pytest.raises(DataError, match=told):
        open_shard(own_copy, own_copy.shards[0])
    file.unlink()
    with pytest.raises(DataError, match=r"offsets 00000\.offsets of shard 00000\.tar: cannot open .*; copy it again"):
        open_shard(own_copy, own_copy.shards[0])
    assert open_files(own_copy.directory) == []


@pytest.mark.parametrize("row", [(0, 60, 1), (2**32 - 1, 60, 1), (2, 2**32 - 1, 1), (2, 0, 1)])
def test_offsets_of_a_right_hash_that_do_not_fit_the_shard_are_named(
    own_copy: ShardIndex, row: tuple[int, int, int]
) -> None:
    shard = own_copy.shards[0]
    table = read_offsets(shard, LocalShards(own_copy).open).copy()
    table[1] = row
    with closing(ShardReader(LocalShards(own_copy).open, shard, table)) as reader:
        reader.read(0)
        with pytest.raises(
            DataError, match=r"shard 00000\.tar at byte \d+: it does not match 00000\.offsets; copy it again"
        ):
            reader.read(1)
