"""The bounded folder: what is evicted, what is waited for, and what is left behind."""

import os
import shutil
import stat
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from data.shards import cache as cache_directory
from data.shards.cache import CacheDirectory, DownloadingError, NoRoomError, cache_folder
from data.shards.index import Shard, ShardIndex
from data.storage.files import sha256_of
from data.storage.location import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def cache_of(folder: Path, prepared: ShardIndex, num_shards: int) -> CacheDirectory:
    """A cache for so many shards, all of one size."""
    return CacheDirectory(folder, num_shards * prepared.shards[0].num_bytes)


def opened(cache: CacheDirectory, prepared: ShardIndex, number: int, *, needed: tuple[Shard, ...] = ()) -> int:
    """A descriptor of a shard, which is copied into the cache if need be."""
    shard = prepared.shards[number]
    descriptor = cache.open(shard)
    if descriptor is None:
        descriptor = cache.add(shard, partial(copy, prepared, shard), needed=needed)
    return descriptor


def copy(prepared: ShardIndex, shard: Shard, target: Path) -> None:
    shutil.copyfile(prepared.directory / shard.name, target)


def stored(prepared: ShardIndex, folder: Path) -> set[int]:
    """Numbers of the shards whose files are in the folder."""
    return {number for number, shard in enumerate(prepared.shards) if (folder / f"{shard.sha256}.tar").exists()}


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_least_recently_opened_shard_is_evicted(prepared: ShardIndex, folder: Path) -> None:
    cache = cache_of(folder, prepared, 3)
    for number in (0, 1, 2, 0):
        os.close(opened(cache, prepared, number))
        time.sleep(0.02)
    os.close(opened(cache, prepared, 3))
    assert stored(prepared, folder) == {0, 2, 3}


def test_open_shard_is_never_evicted(prepared: ShardIndex, folder: Path) -> None:
    cache, other = cache_of(folder, prepared, 2), cache_of(folder, prepared, 2)
    descriptor = opened(cache, prepared, 0)
    for number in (1, 2, 3, 4):
        os.close(opened(other, prepared, number))
        assert stored(prepared, folder) == {0, number}
    with open(descriptor, "rb") as file:
        assert file.read() == (prepared.directory / "00000.tar").read_bytes()
    for number in (5, 6):
        os.close(opened(cache, prepared, number))
    assert stored(prepared, folder) == {5, 6}


def test_full_of_open_shards_waits_until_one_is_closed(prepared: ShardIndex, folder: Path) -> None:
    cache = cache_of(folder, prepared, 2)
    first, second = (opened(cache, prepared, number) for number in (0, 1))
    threading.Timer(0.4, os.close, (first,)).start()
    began = time.monotonic()
    third = opened(cache, prepared, 2)
    assert time.monotonic() - began > 0.3
    assert stored(prepared, folder) == {1, 2}
    os.close(second)
    os.close(third)


def test_two_that_wait_for_room_for_one_do_not_block_each_other(prepared: ShardIndex, folder: Path) -> None:
    cache = cache_of(folder, prepared, 1)
    first = opened(cache, prepared, 0)
    done: list[int] = []

    def open_and_close(number: int) -> None:
        descriptor = opened(cache_of(folder, prepared, 1), prepared, number)
        done.append(number)
        os.close(descriptor)

    threads = [threading.Thread(target=open_and_close, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert done == []
    os.close(first)
    for thread in threads:
        thread.join(20)
    assert sorted(done) == [1, 2]


def test_room_that_never_comes_is_an_error_that_names_the_setting(
    prepared: ShardIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_directory, "WAIT_FOR_ROOM_S", 0.2)
    cache = cache_of(folder, prepared, 1)
    descriptor = opened(cache, prepared, 0)
    with pytest.raises(DataError, match=rf"shard 00001\.tar: the cache {folder} is full of .*: raise data\.cache_gb"):
        opened(cache, prepared, 1)
    assert names(folder) == {"lock", f"{prepared.shards[0].sha256}.tar"}
    os.close(descriptor)
    os.close(opened(cache, prepared, 1))


def test_needed_shards_are_evicted_last_and_never_without_waiting(prepared: ShardIndex, folder: Path) -> None:
    cache = cache_of(folder, prepared, 3)
    needed = prepared.shards[:2]
    for number in (0, 1, 5):
        os.close(opened(cache, prepared, number))
    held = opened(cache, prepared, 6, needed=needed)
    assert stored(prepared, folder) == {0, 1, 6}
    with pytest.raises(NoRoomError):
        cache.add(prepared.shards[7], partial(copy, prepared, prepared.shards[7]), needed=needed, wait=False)
    os.close(opened(cache, prepared, 7, needed=needed))
    assert stored(prepared, folder) == {1, 6, 7}
    os.close(held)


def test_shard_that_is_being_added_is_not_waited_for_when_told(prepared: ShardIndex, folder: Path) -> None:
    cache = cache_of(folder, prepared, 3)
    shard = prepared.shards[0]

    def fill(part: Path) -> None:
        with pytest.raises(DownloadingError):
            cache.add(shard, partial(copy, prepared, shard), wait=False)
        copy(prepared, shard, part)

    os.close(cache.add(shard, fill))


def test_file_that_was_cut_counts_as_missing(prepared: ShardIndex, folder: Path) -> None:
    cache = cache_of(folder, prepared, 3)
    os.close(opened(cache, prepared, 0))
    os.truncate(folder / f"{prepared.shards[0].sha256}.tar", 1000)
    assert cache.open(prepared.shards[0]) is None
    assert names(folder) == {"lock"}


def flip_a_bit(file: Path) -> None:
    """Alter a file in place; its size and its modification time stay."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[700] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_altered_file_counts_as_missing_for_a_process_that_has_not_read_it(
    prepared: ShardIndex, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard = prepared.shards[0]
    os.close(opened(cache_of(folder, prepared, 3), prepared, 0))
    flip_a_bit(folder / f"{shard.sha256}.tar")
    assert cache_of(folder, prepared, 3).open(shard) is None
    assert names(folder) == {"lock"}
    assert "shard 00000.tar: its copy" in caplog.text


def test_file_is_hashed_once_by_each_process_and_not_while_another_has_it_open(
    prepared: ShardIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []

    def count(descriptor: int) -> str:
        hashed.append(descriptor)
        return sha256_of(descriptor)

    monkeypatch.setattr(cache_directory, "sha256_of", count)
    # An object keeps what its process has hashed, so that each one here is as a process of its own.
    first, second, third = (cache_of(folder, prepared, 3) for _ in range(3))
    os.close(opened(first, prepared, 0))
    os.close(opened(first, prepared, 0))
    assert len(hashed) == 0, "the download itself was verified"
    descriptor = opened(second, prepared, 0)
    os.close(opened(third, prepared, 0))
    assert len(hashed) == 1, "another process had it open"
    with open(descriptor, "rb") as file:
        assert file.read() == (prepared.directory / "00000.tar").read_bytes()
    os.close(opened(second, prepared, 0))
    os.close(opened(third, prepared, 0))
    assert len(hashed) == 2


def test_other_files_in_the_folder_are_left_alone(prepared: ShardIndex, folder: Path) -> None:
    folder.mkdir()
    mine = {"00000.tar", "x.part", "a.b.part", "note.lock", f"{'0' * 63}.tar"}
    for name in mine:
        (folder / name).write_bytes(bytes(100))
    cache = cache_of(folder, prepared, 1)
    for number in range(8):
        os.close(opened(cache, prepared, number))
    assert names(folder) == mine | {"lock", f"{prepared.shards[-1].sha256}.tar"}


def test_full_disk_is_one_line_and_leaves_nothing(prepared: ShardIndex, folder: Path) -> None:
    cache = CacheDirectory(folder, 10**9)

    def fill(part: Path) -> None:
        part.write_bytes(bytes(100))
        with Path("/dev/full").open("wb") as full:
            full.write(bytes(100))

    with pytest.raises(DataError, match=rf"shard 00000\.tar: cache {folder}: no space left on its disk .*; free some"):
        cache.add(prepared.shards[0], fill)
    assert names(folder) == {"lock"}


def test_default_folder_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"ddgan-shards-{os.getuid()}"
    assert cache_folder(None) == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert cache_folder(None) == folder
    assert cache_folder("~/x") == Path.home() / "x"
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=rf"{folder} is not your own folder: remove it, or set data\.cache_directory"):
        cache_folder(None)


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
@pytest.mark.parametrize("is_configured", [False, True])
def test_folder_that_others_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_configured: bool, mode: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"ddgan-shards-{os.getuid()}"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(DataError, match=rf"can be written by others, .*: chmod go-w {folder}, or set data\.cache_dir"):
        cache_folder(str(folder) if is_configured else None)
    folder.chmod(0o755)
    assert cache_folder(str(folder) if is_configured else None) == folder


def test_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    (tmp_path / f"ddgan-shards-{other}").mkdir(mode=0o700)
    for configured in (None, str(tmp_path)):
        with pytest.raises(DataError, match="is not your own folder"):
            cache_folder(configured)


def test_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataError, match=rf"data\.cache_directory {file}/cache cannot be used: Not a directory; name a"):
        CacheDirectory(file / "cache", 10**9)
