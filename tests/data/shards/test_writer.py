"""Shards are what any tar reader expects, byte for byte the same each time, and continue where they stopped."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from data.shards.index import Shard
from data.shards.writer import ShardSequence
from data.storage.files import write_json

SAMPLES = [(f"{number:09d}-x", {"png": bytes([number]) * (number * 97), "cls": b"%d" % number}) for number in range(25)]


def write(folder: Path, samples: list[tuple[str, dict[str, bytes]]], finished: list[Shard]) -> list[Shard]:
    with ShardSequence(folder, shard_samples=4, shard_bytes=None, finished=finished) as shards:
        for key, members in samples:
            shards.write(key, members)
        shards.finish()
    return shards.shards


def test_shard_equals_what_webdataset_writes(tmp_path: Path) -> None:
    from webdataset.writer import TarWriter

    shards = write(tmp_path, SAMPLES, [])
    assert [shard.num_samples for shard in shards] == [4, 4, 4, 4, 4, 4, 1]
    for number, shard in enumerate(shards):
        stream = io.BytesIO()
        with TarWriter(stream, user="root", group="root", mode=0o444, mtime=0, encoder=False) as tar:
            for key, members in SAMPLES[4 * number : 4 * number + 4]:
                tar.write({"__key__": key, **members})
        content = (tmp_path / shard.name).read_bytes()
        assert content == stream.getvalue()
        assert (shard.num_bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_shard_is_read_by_tarfile(tmp_path: Path) -> None:
    write(tmp_path, SAMPLES[:3], [])
    with tarfile.open(tmp_path / "00000.tar") as archive:
        found = [(member.name, archive.extractfile(member).read()) for member in archive]  # pyright: ignore
    assert found == [(f"{key}.{name}", members[name]) for key, members in SAMPLES[:3] for name in ("cls", "png")]


@pytest.mark.parametrize("num_finished", [0, 1, 5])
def test_sequence_that_is_continued_equals_one_from_the_start(tmp_path: Path, num_finished: int) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = write(tmp_path / "whole", SAMPLES, [])
    first = write(tmp_path / "parts", SAMPLES[: 4 * num_finished], [])
    assert write(tmp_path / "parts", SAMPLES[4 * num_finished :], first) == whole
    for shard in whole:
        assert (tmp_path / "parts" / shard.name).read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()


def test_write_says_which_sample_finished_a_shard(tmp_path: Path) -> None:
    with ShardSequence(tmp_path, shard_samples=None, shard_bytes=3000) as shards:
        finished = [shards.write(key, members) for key, members in SAMPLES[:6]]
        assert [shard is not None for shard in finished] == [False, True, False, True, False, True]
        assert shards.finish() is None


def test_nothing_is_finished_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), ShardSequence(tmp_path, shard_samples=4, shard_bytes=None) as shards:
        shards.write(*SAMPLES[0])
        raise OSError("the disk is full")
    assert shards.shards == []


def test_json_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 2}
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]
