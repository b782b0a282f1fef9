"""index.json: what is read, and what each wrong one is told."""

import hashlib
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.shards.index import ShardIndex, load_index, verify_present
from data.storage.location import DataError
from tests.launch import ROOT


def test_index_says_what_was_prepared(prepared: ShardIndex) -> None:
    assert (prepared.image_size, prepared.image_channels) == (8, 3)
    assert (prepared.num_classes, prepared.class_names) == (2, ("cat", "dog"))
    assert prepared.num_samples == 40
    assert [shard.num_samples for shard in prepared.shards] == [5] * 8
    assert prepared.version == 2
    names = [f"0000{number}.{kind}" for number in range(8) for kind in ("tar", "offsets")]
    assert [file.name for file in prepared.files] == names
    for file in prepared.files:
        content = (prepared.directory / file.name).read_bytes()
        assert (file.num_bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    verify_present(prepared)


def test_version_1_is_read_and_the_same_shards_have_one_digest(prepared: ShardIndex, version_1: ShardIndex) -> None:
    assert (version_1.version, version_1.num_samples, version_1.class_names) == (1, 40, ("cat", "dog"))
    assert version_1.shards == version_1.files == tuple(replace(shard, offsets=None) for shard in prepared.shards)
    content = (version_1.directory / "index.json").read_bytes()
    assert prepared.digest == version_1.digest == hashlib.sha256(content).hexdigest()
    assert prepared.digest != hashlib.sha256((prepared.directory / "index.json").read_bytes()).hexdigest()


def test_index_that_version_1_of_the_program_wrote_keeps_its_digest_with_offsets(tmp_path: Path) -> None:
    with tarfile.open(ROOT / "tests" / "golden" / "run-format-1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    old = load_index(tmp_path / "points")
    assert old.version == 1
    document = json.loads((old.directory / "index.json").read_text())
    for shard in document["shards"]:
        num_bytes = 12 * shard["num_samples"]
        name = shard["name"].replace(".tar", ".offsets")
        shard["offsets"] = {"name": name, "num_bytes": num_bytes, "sha256": "0" * 64}
    (old.directory / "index.json").write_text(json.dumps({**document, "version": 2}))
    new = load_index(old.directory)
    assert (new.version, new.digest) == (2, old.digest)


def test_digest_tells_shards_and_labels_apart(own_copy: ShardIndex) -> None:
    file = own_copy.directory / "index.json"
    original = file.read_text()
    for old, new in ((own_copy.shards[0].sha256, "0" * 64), ('"dog"', '"fox"'), ('"seed": 0', '"seed": 1')):
        file.write_text(original.replace(old, new))
        assert load_index(own_copy.directory).digest != own_copy.digest


def test_location_is_absolute(prepared: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared.directory.parent)
    index = load_index("set")
    assert (index.location, index.is_remote) == (str(prepared.directory), False)
    assert (index.directory, index.shown_location) == (prepared.directory, index.location)
    assert index == prepared
    with pytest.raises(DataError, match="s3://bucket/set is no local folder, which is needed here"):
        _ = replace(index, location="s3://bucket/set").directory


def test_missing_data_set_is_told_how_to_prepare_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"python -m data.prepare SOURCE --out {tmp_path}/gone") as caught:
        load_index(tmp_path / "gone")
    assert "there is no such folder" in str(caught.value)
    with pytest.raises(DataError, match=r"it has no index\.json"):
        load_index(tmp_path)


def change(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update({key: value})


def change_shard(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["shards"][1].update({key: value})


def change_offsets(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["shards"][1]["offsets"].update({key: value})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (change("version", 3), "version: .*reads ddgan-shards version 1 and 2"),
        (change("version", 1), r"shards\.0\.offsets: version 1 has none"),
        (change_shard("offsets", None), r"shards\.1\.offsets: version 2 needs them"),
        (change_offsets("name", "00002.offsets"), "the name is 00002.offsets, expected is 00001.offsets"),
        (change_offsets("name", "../00001.offsets"), r"shards\.1\.offsets\.name: "),
        (change_offsets("num_bytes", 72), "num_bytes is 72, 5 samples have 60"),
        (change_offsets("sha256", "abc"), r"shards\.1\.offsets\.sha256: "),
        (change_offsets("surprise", 1), r"shards\.1\.offsets\.surprise: "),
        (change("format", "other"), "format: "),
        (change("image_size", "8"), "image_size: .*valid integer"),
        (change("image_channels", 4), "image_channels: "),
        (change("surprise", 1), "surprise: "),
        (change("shards", []), "shards: .*at least 1"),
        (change("num_classes", 3), "class_names do not number 3"),
        (lambda content: content.pop("source"), "source: .*required"),
        (lambda content: content["shards"].append(content["shards"][0]), "listed twice"),
        (change_shard("name", "../00001.tar"), r"shards\.1\.name: "),
        (change_shard("name", "pipe:cat x.tar"), r"shards\.1\.name: "),
        (change_shard("name", "/etc/x.tar"), r"shards\.1\.name: "),
        (change_shard("num_samples", 0), r"shards\.1\.num_samples: .*greater than 0"),
        (change_shard("sha256", "abc"), r"shards\.1\.sha256: "),
    ],
)
def test_wrong_index_is_refused_by_field(
    own_copy: ShardIndex, damage: Callable[[dict[str, Any]], object], told: str
) -> None:
    file = own_copy.directory / "index.json"
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=told) as caught:
        load_index(own_copy.directory)
    assert str(file) in str(caught.value)
    assert "prepare the data set again" in str(caught.value)


def test_index_that_is_no_json_is_refused(own_copy: ShardIndex) -> None:
    (own_copy.directory / "index.json").write_bytes(b'{"format": ')
    with pytest.raises(DataError, match=r"index\.json: the file: Invalid JSON"):
        load_index(own_copy.directory)


def test_missing_shard_is_named(own_copy: ShardIndex) -> None:
    file = own_copy.directory / "00003.tar"
    file.unlink()
    with pytest.raises(DataError, match=r"shard 00003\.tar: cannot read .*No such file.*; copy it again") as caught:
        verify_present(own_copy)
    assert str(file) in str(caught.value)


def test_missing_offsets_are_named_with_their_shard(own_copy: ShardIndex) -> None:
    (own_copy.directory / "00003.offsets").unlink()
    with pytest.raises(DataError, match=r"offsets 00003\.offsets of shard 00003\.tar: cannot read .*; copy it again"):
        verify_present(own_copy)


def test_truncated_shard_is_named_with_both_sizes(own_copy: ShardIndex) -> None:
    file = own_copy.directory / "00002.tar"
    file.write_bytes(file.read_bytes()[:-512])
    stated = own_copy.shards[2].num_bytes
    with pytest.raises(DataError, match=rf"00002\.tar has {stated - 512} bytes, the index says {stated}"):
        verify_present(own_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 8193}, "image_size: Input should be less than or equal to 8192"),
        ({"num_samples": 10**9}, r"shards\.0: \d+ bytes cannot hold 1000000000 samples"),
        ({"num_bytes": 10**30}, r"shards\.0\.num_bytes: Input should be"),
    ],
)
def test_number_that_the_bytes_cannot_hold_is_refused(
    own_copy: ShardIndex, change: dict[str, Any], message: str
) -> None:
    file = own_copy.directory / "index.json"
    document = json.loads(file.read_text())
    (document if "image_size" in change else document["shards"][0]).update(change)
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match=message):
        load_index(own_copy.directory)


def test_control_characters_of_class_names_are_escaped(own_copy: ShardIndex) -> None:
    file = own_copy.directory / "index.json"
    file.write_text(file.read_text().replace('"dog"', r'"d\u001b[2Jog\n"'))
    assert load_index(own_copy.directory).class_names == ("cat", r"d\x1b[2Jog\n")
