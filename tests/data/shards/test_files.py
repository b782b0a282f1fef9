"""The shared cache of downloaded shards: once per host, whole or not at all, bounded, and never what is open."""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data.shards.files import CachedShards, LocalShards, check_room, required_bytes, shard_files
from data.shards.index import ShardIndex, load_index
from data.shards.reader import ShardReader
from data.storage.location import DataError
from tests.data.servers import Fault, FaultyServer, serve


@pytest.fixture
def caches(folder: Path, index: ShardIndex) -> Iterator[Callable[[int], CachedShards]]:
    """Caches of a capacity, in shards, all on one folder; closed at the end."""
    made: list[CachedShards] = []

    def make(num_shards: int) -> CachedShards:
        # And for all offsets, which are small.
        made.append(CachedShards(index, folder, num_shards * size_of(index) + size_of(index) // 2))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def size_of(index: ShardIndex) -> int:
    """All shards of the test data have one size."""
    (size,) = {shard.num_bytes for shard in index.shards}
    return size


def read(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def shards_in(folder: Path) -> set[str]:
    return {name for name in names(folder) if not name.endswith(".offsets")}


def cached(index: ShardIndex, folder: Path) -> set[int]:
    """Numbers of the shards whose files are in the folder."""
    return {number for number, shard in enumerate(index.shards) if (folder / f"{shard.sha256}.tar").exists()}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def test_samples_of_downloaded_shards_are_those_of_local_ones(
    prepared: ShardIndex, caches: Callable[[int], CachedShards]
) -> None:
    local, remote = LocalShards(prepared), caches(8)
    for shard in prepared.shards:
        readers = [ShardReader(files.open, shard) for files in (local, remote)]
        for sample in range(shard.num_samples):
            one, two = (reader.read(sample) for reader in readers)
            assert one == two
        for reader in readers:
            reader.close()


def test_location_decides_where_files_come_from(prepared: ShardIndex, index: ShardIndex, folder: Path) -> None:
    assert isinstance(shard_files(prepared, cache_directory=str(folder), cache_gb=1.0), LocalShards)
    assert not folder.exists()
    assert isinstance(shard_files(index, cache_directory=str(folder), cache_gb=1.0), CachedShards)
    with pytest.raises(DataError, match=r"shard gone\.tar: cannot open .*gone\.tar: No such file"):
        LocalShards(prepared).open(replace(prepared.shards[0], name="gone.tar"))


def test_cache_that_cannot_hold_what_a_run_keeps_open_is_refused_before_it_starts(
    prepared: ShardIndex, index: ShardIndex, folder: Path
) -> None:
    size = size_of(index) + 60  # with the offsets of five samples
    large = replace(index, shards=(*index.shards[1:], replace(index.shards[0], num_bytes=10 * size - 60)))
    assert required_bytes(large, 1) == 12 * size
    assert required_bytes(large, 2) == 15 * size
    assert required_bytes(large, 8) == 17 * size
    check_room(large, cache_gb=15 * size / 1e9, window_shards=2)
    check_room(prepared, cache_gb=1e-9, window_shards=2)
    with pytest.raises(
        DataError, match=r"data\.cache_gb is 0\.0003, but 3 windows of data\.shuffle_window_shards=2 sh"
    ):
        check_room(large, cache_gb=0.0003, window_shards=2)
    with pytest.raises(
        DataError, match=r"but its largest shard of http.* take 0\.\d+: set data\.cache_gb to 0\.\d+ or"
    ):
        CachedShards(large, folder, 10 * size - 1)
    assert not folder.exists()


def test_download_with_another_hash_is_repeated_and_then_refused(
    server: FaultyServer, index: ShardIndex, folder: Path, caches: Callable[[int], CachedShards]
) -> None:
    cache, shard, other = caches(8), index.shards[0], index.shards[1]
    server.faults = {shard.name: [Fault(altered=True)], other.name: [Fault(altered=True)] * 2}
    assert hashlib.sha256(read(cache.open(shard))).hexdigest() == shard.sha256
    assert server.gets[shard.name] == 2
    with pytest.raises(DataError, match=rf"shard {other.name}: {server.url}/{other.name} was altered: its") as caught:
        cache.open(other)
    assert f"the index says {other.sha256}; upload it again" in str(caught.value)
    assert server.gets[other.name] == 2
    assert names(folder) == {f"{shard.sha256}.tar", "lock"}


def test_missing_shard_is_named_and_leaves_nothing(
    server: FaultyServer, index: ShardIndex, folder: Path, caches: Callable[[int], CachedShards]
) -> None:
    server.faults["00003.tar"] = [Fault(status=404)]
    with pytest.raises(
        DataError, match=rf"shard 00003\.tar: cannot read {server.url}/00003\.tar: there is no such file"
    ):
        caches(8).open(index.shards[3])
    assert names(folder) == {"lock"}


def test_copies_of_a_data_set_share_their_shards(
    prepared: ShardIndex, index: ShardIndex, folder: Path, caches: Callable[[int], CachedShards]
) -> None:
    os.close(caches(8).open(index.shards[0]))
    with serve(prepared.directory) as copy:
        other = CachedShards(load_index(copy.url), folder, 10**9)
        os.close(other.open(index.shards[0]))
        assert copy.gets["00000.tar"] == 0


def test_shards_are_fetched_ahead_in_order_and_opened_without_another_download(
    server: FaultyServer, index: ShardIndex, folder: Path, caches: Callable[[int], CachedShards]
) -> None:
    server.faults["00005.tar"] = [Fault(stall_after=600)]
    cache = caches(8)
    cache.prefetch([index.shards[number] for number in (5, 2, 7)])
    # It has come back although the first download stalls.
    assert server.stalled.wait(20)
    assert cached(index, folder) == set()
    server.released.set()
    wait_until(lambda: cached(index, folder) == {5, 2, 7}, "three shards are there")
    assert [name for name in server.gets if name.endswith(".tar")] == ["00005.tar", "00002.tar", "00007.tar"]
    os.close(cache.open(index.shards[2]))
    assert server.gets["00002.tar"] == 1
    # The offsets came first: the first shard stalled.
    assert set(list(server.gets)[1:4]) == {"00005.offsets", "00002.offsets", "00007.offsets"}


def test_fetching_ahead_passes_over_what_another_process_downloads(
    server: FaultyServer, index: ShardIndex, folder: Path, caches: Callable[[int], CachedShards]
) -> None:
    server.faults["00000.tar"] = [Fault(stall_after=600)]
    caches(8).prefetch(index.shards[:1])
    assert server.stalled.wait(20)
    caches(8).prefetch(index.shards[:3])
    wait_until(lambda: cached(index, folder) == {1, 2}, "the others are there")
    server.released.set()
    wait_until(lambda: cached(index, folder) == {0, 1, 2}, "the first one is there")
    assert server.gets["00000.tar"] == 1


def test_fetching_ahead_evicts_neither_what_is_needed_nor_what_is_open(
    server: FaultyServer, index: ShardIndex, folder: Path, caches: Callable[[int], CachedShards]
) -> None:
    cache = caches(4)
    held = cache.open(index.shards[7])
    os.close(cache.open(index.shards[6]))
    cache.prefetch(index.shards[:6])
    wait_until(lambda: cached(index, folder) == {7, 0, 1, 2}, "all room is used")
    time.sleep(0.3)
    # There is no room for number 3: it is not even asked for.
    assert cached(index, folder) == {7, 0, 1, 2}
    assert server.gets["00003.tar"] == 0
    # What is read now comes first, and the list continues from there.
    os.close(held)
    os.close(cache.open(index.shards[3]))
    assert cached(index, folder) == {0, 1, 2, 3}


def test_later_list_replaces_the_earlier_one(
    server: FaultyServer, index: ShardIndex, folder: Path, caches: Callable[[int], CachedShards]
) -> None:
    server.faults["00000.tar"] = [Fault(stall_after=600)]
    cache = caches(8)
    cache.prefetch(index.shards[:4])
    assert server.stalled.wait(20)
    cache.prefetch(index.shards[6:])
    server.released.set()
    wait_until(lambda: cached(index, folder) == {0, 6, 7}, "the new list is there")
    assert server.gets["00001.tar"] == 0


def test_closing_abandons_a_download_at_once(
    server: FaultyServer, index: ShardIndex, folder: Path, caches: Callable[[int], CachedShards]
) -> None:
    server.faults["00000.tar"] = [Fault(stall_after=600)]
    cache = caches(8)
    cache.prefetch(index.shards)
    assert server.stalled.wait(20)
    began = time.monotonic()
    cache.close()
    assert time.monotonic() - began < 2
    assert shards_in(folder) == {"lock"}
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch-shards"]
    cache.prefetch(index.shards)
    cache.close()
    assert shards_in(folder) == {"lock"}


def test_error_of_fetching_ahead_is_logged_once_and_left_to_opening(
    server: FaultyServer,
    index: ShardIndex,
    folder: Path,
    caches: Callable[[int], CachedShards],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.faults["00000.tar"] = [Fault(status=403)]
    cache = caches(8)
    with caplog.at_level(logging.WARNING):
        cache.prefetch(index.shards[:2])
        wait_until(lambda: cached(index, folder) == {1}, "the one behind it is there")
        cache.prefetch(index.shards[:3])
        wait_until(lambda: cached(index, folder) == {1, 2}, "the next list is there")
    lines = [record.getMessage() for record in caplog.records if record.name == "data.shards.files"]
    assert len(lines) == 1
    assert lines[0].startswith(
        f"fetching ahead: shard 00000.tar: cannot read {server.url}/00000.tar: permission denied"
    )
    os.close(cache.open(index.shards[0]))


def test_offsets_are_downloaded_once_and_count_in_the_cache(
    server: FaultyServer, index: ShardIndex, folder: Path, caches: Callable[[int], CachedShards]
) -> None:
    for cache in (caches(8), caches(8)):
        for shard in index.shards[:3]:
            ShardReader(cache.open, shard).close()
    wanted = [file for shard in index.shards[:3] for file in shard.files]
    assert {file.name: server.gets[file.name] for file in wanted} == {file.name: 1 for file in wanted}
    suffixes = {file.sha256: Path(file.name).suffix for file in wanted}
    assert names(folder) == {f"{sha256}{suffix}" for sha256, suffix in suffixes.items()} | {"lock"}
    # A folder that is full of offsets and shards makes room by both.
    tight = CachedShards(index, folder, size_of(index) + 60)
    ShardReader(tight.open, index.shards[7]).close()
    last = {f"{file.sha256}{Path(file.name).suffix}" for file in index.shards[7].files}
    assert names(folder) == last | {"lock"}
    tight.close()


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ([Fault(status=404)], "there is no such file"),
        ([Fault(content=bytes(60))] * 2, "was altered: its SHA-256 is .*; upload it again"),
        ([Fault(content=bytes(72))], "it has .*, the index says 60; upload it again"),
    ],
)
def test_missing_and_altered_offsets_at_a_url_are_named(
    server: FaultyServer,
    index: ShardIndex,
    folder: Path,
    caches: Callable[[int], CachedShards],
    faults: list[Fault],
    told: str,
) -> None:
    server.faults["00003.offsets"] = list(faults)
    with pytest.raises(DataError, match=rf"^offsets 00003\.offsets.*{told}") as caught:
        ShardReader(caches(8).open, index.shards[3])
    assert f"{server.url}/00003.offsets" in str(caught.value)
    assert names(folder) == {f"{index.shards[3].sha256}.tar", "lock"}
    # It is whole now.
    ShardReader(caches(8).open, index.shards[3]).close()
