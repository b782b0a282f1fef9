"""A merged data set holds the samples of all, under one list of classes."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.prepare.command import main
from data.sets import merge
from data.sets.origin import original_sides
from data.shards.files import LocalShards
from data.shards.index import ShardIndex, load_index
from data.shards.reader import EncodedSample, samples_in_order

Refusal = Callable[..., str]


def prepare(folder: Path, out: Path, *options: object) -> ShardIndex:
    arguments = [folder, "--out", out, "--size", 8, "--workers", 0, *options]
    assert main([str(argument) for argument in arguments]) == 0
    return load_index(out)


def merged(out: Path, *indexes: ShardIndex) -> ShardIndex:
    assert main(["merge", *(index.location for index in indexes), "--out", str(out)]) == 0
    assert main(["verify", str(out), "--workers", "0"]) == 0
    return load_index(out)


def samples(index: ShardIndex) -> list[EncodedSample]:
    return list(samples_in_order(index.shards, LocalShards(index).open))


def named(index: ShardIndex) -> list[tuple[bytes, str | None]]:
    """Content and class of every image."""
    names = index.class_names
    return [(x.content, None if names is None or x.label is None else names[x.label]) for x in samples(index)]


@pytest.fixture
def other(tmp_path: Path) -> ShardIndex:
    """Three images each of a bird and of a dog, whose labels here are 0 and 1."""
    for number in range(6):
        file = tmp_path / "birds" / ("bird", "dog")[number % 2] / f"b{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), 40 * number, dtype=np.uint8)).save(file)
    return prepare(tmp_path / "birds", tmp_path / "other", "--shard-samples", 4)


def test_classes_are_united_by_name_and_shards_whose_labels_stay_are_the_same_files(
    prepared: ShardIndex, other: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = merged(tmp_path / "set", prepared, other)
    assert "8 shards taken as they are, 2 written anew" in capsys.readouterr().out
    assert index.class_names == ("cat", "dog", "bird")
    assert named(index) == named(prepared) + named(other)
    for shard in prepared.shards:
        assert os.path.samefile(index.directory / shard.name, prepared.directory / shard.name)
    assert index.source == f"merge:{prepared.source}+{other.source}"
    assert index.options["size"] == 8
    assert "shard_samples" not in index.options


def test_sizes_of_the_originals_are_kept_if_all_have_them(
    own_copy: ShardIndex, other: ShardIndex, tmp_path: Path
) -> None:
    assert original_sides(merged(tmp_path / "set", own_copy, other).location) == {9: 6, 20: 14, 21: 13, 22: 13}
    (own_copy.directory / "origin.json").unlink()
    assert not (merged(tmp_path / "less", own_copy, other).directory / "origin.json").exists()


def test_data_sets_come_back_whole_when_links_are_refused(
    prepared: ShardIndex, version_1: ShardIndex, other: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(merge.os, "link", refuse)
    index = merged(tmp_path / "set", version_1, other)
    assert index.version == 2
    assert named(index) == named(prepared) + named(other)


def test_keys_that_clash_get_the_number_of_their_data_set(class_folder: Path, tmp_path: Path) -> None:
    first, second = (prepare(class_folder, tmp_path / str(seed), "--seed", seed) for seed in (0, 1))
    index = merged(tmp_path / "set", first, second)
    assert [x.key for x in samples(index)] == [x.key for x in samples(first)] + [f"{x.key}-2" for x in samples(second)]
    assert named(index) == named(first) + named(second)
    # Keys of a merged set clash as well.
    third = prepare(class_folder, tmp_path / "2", "--seed", 2)
    assert merged(tmp_path / "all", index, third).num_samples == 120


def test_second_merge_finds_the_work_done(
    prepared: ShardIndex, other: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    merged(tmp_path / "set", prepared, other)
    capsys.readouterr()
    command = ["merge", prepared.location, other.location, "--out", str(tmp_path / "set")]
    assert main(command) == 0
    assert "already holds this data set (46 images); nothing to do" in capsys.readouterr().out
    told = refusal("merge", other.location, prepared.location, "--out", tmp_path / "set")
    assert "holds another prepared data set" in told


def test_data_sets_of_other_forms_are_refused_by_their_difference(
    prepared: ShardIndex, class_folder: Path, tmp_path: Path, refusal: Refusal
) -> None:
    for options, difference in (
        (["--size", 16], "image size 8 and 16"),
        (["--channels", 1], "channels 3 and 1"),
        (["--classes", "none"], "classes some and none"),
    ):
        other = prepare(class_folder, tmp_path / str(options[1]), "--upscale", *options)
        told = refusal("merge", prepared.location, other.location, "--out", tmp_path / "set")
        assert f"have not one form: {difference}; prepare one" in told
    assert "are the same data set" in refusal("merge", prepared.location, prepared.location, "--out", tmp_path / "set")
    assert "only one data set is given" in refusal("merge", prepared.location, "--out", tmp_path / "set")
    assert "is a URL" in refusal("merge", "s3://me:secret@a/b", prepared.location, "--out", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_altered_shard_ends_a_merge_and_leaves_nothing(
    own_copy: ShardIndex, other: ShardIndex, tmp_path: Path, refusal: Refusal
) -> None:
    shard = own_copy.directory / "00002.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(bytes(content))
    (tmp_path / "out").mkdir()
    told = refusal("merge", other.location, own_copy.location, "--out", tmp_path / "out" / "set", code=1)
    assert "shard 00002.tar was altered" in told
    assert list((tmp_path / "out").iterdir()) == []
