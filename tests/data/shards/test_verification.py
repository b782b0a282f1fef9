"""Checks before training: which shards are missing or altered, and what is not read twice."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.shards.index import ShardIndex, load_index
from data.shards.verification import READ_AGAIN_S, verify_shards
from data.storage import remote as storage
from data.storage.location import DataError
from tests.data.servers import Fault, FaultyServer, serve


@pytest.fixture
def server(own_copy: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """A copy that a test may damage, over HTTP."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(own_copy.directory) as state:
        yield state


def alter(file: Path, *, keep_time: bool = False) -> None:
    """Change a byte in place; the size stays, and the time of change on request."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(700)
        byte = stream.read(1)
        stream.seek(700)
        stream.write(bytes([byte[0] ^ 1]))
    times = (before.st_atime_ns, before.st_mtime_ns + (0 if keep_time else 1))
    os.utime(file, ns=times)


def test_shards_of_the_index_pass(prepared: ShardIndex, tmp_path: Path) -> None:
    verify_shards(prepared, by="hash", cache_directory=str(tmp_path / "cache"))
    verify_shards(prepared, by="size", cache_directory=str(tmp_path / "cache"))


def test_altered_shard_is_named_by_its_hash_alone(own_copy: ShardIndex, tmp_path: Path) -> None:
    alter(own_copy.directory / "00002.tar")
    verify_shards(own_copy, by="size", cache_directory=str(tmp_path))
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"1 of 16 files in .*: shard 00002\.tar was altered, its SHA-256 is"
        ) as caught:
            verify_shards(own_copy, by="hash", cache_directory=str(tmp_path))
        assert f"instead of {own_copy.shards[2].sha256}; copy them again, or remove the folder" in str(caught.value)
        assert str(own_copy.directory) in str(caught.value)


def test_altered_offsets_are_named_like_shards(own_copy: ShardIndex, tmp_path: Path) -> None:
    file = own_copy.directory / "00002.offsets"
    file.write_bytes(bytes(60))
    verify_shards(own_copy, by="size", cache_directory=str(tmp_path))
    told = r"1 of 16 files in .*: offsets 00002\.offsets of shard 00002\.tar was altered, its SHA-256 is"
    with pytest.raises(DataError, match=told):
        verify_shards(own_copy, by="hash", cache_directory=str(tmp_path))
    file.unlink()
    with pytest.raises(DataError, match=r"offsets 00002\.offsets of shard 00002\.tar is missing; copy them again"):
        verify_shards(own_copy, by="size", cache_directory=str(tmp_path))


def test_shards_of_version_1_pass_and_are_counted_alone(version_1: ShardIndex, tmp_path: Path) -> None:
    verify_shards(version_1, by="hash", cache_directory=str(tmp_path))
    alter(version_1.directory / "00002.tar")
    with pytest.raises(DataError, match=r"1 of 8 files in .*: shard 00002\.tar was altered"):
        verify_shards(version_1, by="hash", cache_directory=str(tmp_path))


@pytest.mark.parametrize("by", ["hash", "size"])
def test_missing_and_cut_shards_are_counted_and_the_first_few_named(own_copy: ShardIndex, tmp_path: Path, by) -> None:
    size = own_copy.shards[1].num_bytes
    (own_copy.directory / "00001.tar").write_bytes(bytes(size - 512))
    for number in (2, 3, 4, 5, 6, 7):
        (own_copy.directory / f"0000{number}.tar").unlink()
    told = (
        rf"7 of 16 files in .* are missing or altered: shard 00001\.tar has {size - 512} bytes instead of {size}, "
        r"shard 00002\.tar is missing, .*00005\.tar is missing, and 2 more; copy them again"
    )
    with pytest.raises(DataError, match=told):
        verify_shards(own_copy, by=by, cache_directory=str(tmp_path))


def test_shards_are_read_once_and_again_only_after_a_change(
    own_copy: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size_gb = own_copy.shards[0].num_bytes / 1e9
    whole_gb = sum(file.num_bytes for file in own_copy.files) / 1e9
    with caplog.at_level(logging.INFO):
        verify_shards(own_copy, by="hash", cache_directory=str(tmp_path))
    assert caplog.messages == [f"checking the hashes of 16 files, {whole_gb:.3g} GB"]
    caplog.clear()

    with caplog.at_level(logging.INFO):
        verify_shards(own_copy, by="hash", cache_directory=str(tmp_path))
    assert caplog.messages == []

    # The change time, which no program can set back, shows it.
    alter(own_copy.directory / "00003.tar", keep_time=True)
    with caplog.at_level(logging.INFO), pytest.raises(DataError, match=r"shard 00003\.tar was altered"):
        verify_shards(own_copy, by="hash", cache_directory=str(tmp_path))
    assert caplog.messages == [f"checking the hashes of 1 files, {size_gb:.3g} GB"]


def test_files_are_read_again_after_a_month_or_when_the_clock_went_back(
    own_copy: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started, readings = 1_800_000_000, []
    for later_s in (0, READ_AGAIN_S - 1, READ_AGAIN_S, READ_AGAIN_S + 1, 0):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            now = started + later_s
            verify_shards(own_copy, by="hash", cache_directory=str(tmp_path), clock=lambda now=now: now)
        readings.append(len(caplog.messages))
    assert readings == [1, 0, 1, 0, 1]


def test_cache_folder_that_others_can_write_is_refused(prepared: ShardIndex, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o1777)
    with pytest.raises(DataError, match="can be written by others"):
        verify_shards(prepared, by="hash", cache_directory=str(cache))


def test_file_that_was_replaced_is_read_again(own_copy: ShardIndex, tmp_path: Path) -> None:
    verify_shards(own_copy, by="hash", cache_directory=str(tmp_path))
    file = own_copy.directory / "00003.tar"
    before = file.stat()
    other = tmp_path / "other.tar"
    other.write_bytes(bytes(before.st_size))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(file)
    with pytest.raises(DataError, match=r"shard 00003\.tar was altered"):
        verify_shards(own_copy, by="hash", cache_directory=str(tmp_path))


def test_what_was_read_is_remembered_for_each_copy(
    own_copy: ShardIndex, prepared: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    with caplog.at_level(logging.INFO):
        for index in (own_copy, prepared, own_copy, prepared):
            verify_shards(index, by="hash", cache_directory=str(cache))
    assert len(caplog.messages) == 2
    files = list((cache / "verified").iterdir())
    assert len(files) == 2
    for file in files:
        assert file.name.startswith(prepared.digest)
        assert set(json.loads(file.read_text())) == {file.name for file in prepared.files}


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"00000.tar": 7}', b'{"00000.tar": [1, 2]}', b"\xff"])
def test_damaged_note_of_what_was_read_is_ignored(own_copy: ShardIndex, tmp_path: Path, content: bytes) -> None:
    verify_shards(own_copy, by="hash", cache_directory=str(tmp_path), clock=lambda: 1.8e9)
    (note,) = (tmp_path / "verified").iterdir()
    right = note.read_bytes()
    note.write_bytes(content)
    verify_shards(own_copy, by="hash", cache_directory=str(tmp_path), clock=lambda: 1.8e9)
    assert note.read_bytes() == right


def test_folder_that_cannot_be_written_does_not_stop_a_local_run(
    own_copy: ShardIndex, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        verify_shards(own_copy, by="hash", cache_directory=str(tmp_path / "file"))
    assert "the hashes are right, but will be checked again at the next start: " in caplog.text
    alter(own_copy.directory / "00000.tar")
    with pytest.raises(DataError, match=r"shard 00000\.tar was altered"):
        verify_shards(own_copy, by="hash", cache_directory=str(tmp_path / "file"))


@pytest.mark.parametrize("by", ["hash", "size"])
def test_remote_shards_are_asked_for_and_not_read(
    own_copy: ShardIndex, server: FaultyServer, tmp_path: Path, by
) -> None:
    index = load_index(server.url)
    server.faults["00000.tar"] = [Fault(status=404)]
    verify_shards(index, by=by, cache_directory=str(tmp_path))
    size = own_copy.shards[1].num_bytes
    (own_copy.directory / "00001.tar").write_bytes(bytes(size + 512))
    (own_copy.directory / "00004.tar").unlink()
    (own_copy.directory / "00005.offsets").unlink()
    told = (
        rf"3 of 16 files in {server.url} are missing or altered: shard 00001\.tar has {size + 512} bytes instead of "
        rf"{size}, shard 00004\.tar is missing, offsets 00005\.offsets of shard 00005\.tar is missing; upload them"
    )
    with pytest.raises(DataError, match=told):
        verify_shards(index, by=by, cache_directory=str(tmp_path))
    # One of each missing file: fsspec asks again with GET where HEAD fails.
    gets = {name: count for name, count in server.gets.items() if count}
    assert gets == {"index.json": 1, "00004.tar": 1, "00005.offsets": 1}
    assert list(tmp_path.glob("verified/*")) == []


def test_remote_that_refuses_is_told(server: FaultyServer, tmp_path: Path) -> None:
    index = load_index(server.url)
    server.always = Fault(status=403)
    with pytest.raises(
        DataError, match=rf"(shard 0000\d\.tar|offsets 0000\d\.offsets): cannot read {server.url}/.*: permission denied"
    ):
        verify_shards(index, by="hash", cache_directory=str(tmp_path))
