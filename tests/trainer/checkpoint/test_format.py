"""A checkpoint is all or nothing, and is read by ranges whoever wrote it."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from tests.trainer.checkpoint.saved import fragments, write
from trainer.checkpoint.format import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    encode_manifest,
    list_checkpoints,
    newest_valid,
    parse_manifest,
    rank_file,
)
from trainer.checkpoint.part import HostMemory
from trainer.checkpoint.storage import FolderStorage
from trainer.checkpoint.writer import write_part
from trainer.engine.ranks import Ranks


@pytest.fixture
def ranks():
    joined = Ranks.join("cpu", 60)
    yield joined
    joined.leave()


def test_what_was_saved_is_read_by_ranges(tmp_path, ranks):
    write(tmp_path, ranks, 5)
    found = newest_valid(tmp_path)
    assert found
    section = found.section("generator")
    assert section.read("parameter", "layer.weight", 3, 7).tolist() == [3, 4, 5, 6]
    assert found.extras("statistics", 0) == {"loss": torch.tensor(5.0)}


def test_ranges_are_joined_across_the_files_of_ranks(tmp_path):
    for rank, (start, stop) in enumerate([(0, 3), (3, 8), (8, 10)]):
        part = HostMemory(torch.device("cpu")).take({"generator": fragments(start, stop)}, {})
        write_part(FolderStorage(tmp_path), "step-00000001", rank_file(rank), part)
    folder = tmp_path / "step-00000001"
    files = {file.name: {} for file in folder.iterdir()}
    section = Checkpoint(folder, {"step": 1, "files": files}).section("generator")
    assert section.lengths() == {"generator/parameter/layer.weight": 10}
    for start in range(11):
        for stop in range(start, 11):
            assert section.read("parameter", "layer.weight", start, stop).tolist() == list(range(start, stop))


def test_parameters_of_another_network_are_named(tmp_path, ranks):
    write(tmp_path, ranks, 5)
    found = newest_valid(tmp_path)
    assert found
    with pytest.raises(CheckpointError, match=r"holds 10 of 11 elements of generator/parameter/layer\.weight"):
        found.section("generator").read("parameter", "layer.weight", 0, 11)
    with pytest.raises(CheckpointError, match="holds 0 of 4 elements of generator/parameter/other"):
        found.section("generator").read("parameter", "other", 0, 4)


def test_folder_without_a_manifest_is_no_checkpoint_and_is_written_over(tmp_path, ranks):
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000007" / "rank-00009.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    write(tmp_path, ranks, 7)
    found = newest_valid(tmp_path)
    assert found
    assert {p.name for p in found.path.iterdir()} == {"manifest.json", "rank-00000.safetensors"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format_version": 99}',
        '{"format_version": 1}',
        '{"format_version": 1, "step": 9, "world_size": 1, "config": {}, "files": {}}',
        encode_manifest({"format_version": 1}).decode(),
        encode_manifest({"format_version": 1, "step": 8, "world_size": 1, "config": {}, "files": {}}).decode(),
        encode_manifest(
            {"format_version": 1, "step": 9, "world_size": 1, "config": {}, "files": {"../../secret": {}}}
        ).decode(),
    ],
)
def test_unreadable_manifest_is_named_and_passed_over(tmp_path, ranks, caplog, content):
    write(tmp_path, ranks, 5)
    bad = tmp_path / "step-00000009"
    bad.mkdir()
    (bad / "manifest.json").write_text(content)
    assert [c.step for c in list_checkpoints(tmp_path)] == [5]
    assert str(bad) in caplog.text


GOOD = {"format_version": 1, "step": 9, "world_size": 1, "config": {}}
FILES = {"rank-00000.safetensors": {"bytes": 1, "sha256": "0"}}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"step": "9"}, "its step is '9', which no version of this program writes"),
        ({"world_size": True}, "its world_size is True"),
        ({"world_size": 2}, "names 1 parts of 2 ranks"),
        ({"files": []}, r"its files is \[\]"),
        ({"files": {"rank-00000.safetensors": {"bytes": -1, "sha256": "0"}}}, "its files is"),
        ({"files": {"rank\0": {"bytes": 1, "sha256": "0"}}}, "which is no file of its folder"),
        ({"config": None}, "its config is None"),
        ({"images": 2**70}, "its images is"),
        ({"metrics": {"fid": "3"}}, "its metrics is"),
        ({"updates": {"g": [1]}}, "its updates is"),
        ({"created": "\x1b[2J"}, "its created is"),
        ({"mlflow_run_id": 7}, "its mlflow_run_id is 7"),
    ],
)
def test_manifest_with_values_that_no_program_of_ours_writes_is_refused(wrong, told):
    assert parse_manifest(encode_manifest(GOOD | {"files": FILES}), "step-00000009")
    with pytest.raises(ValueError, match=told):
        parse_manifest(encode_manifest(GOOD | {"files": FILES} | wrong), "step-00000009")


def test_any_flipped_bit_of_a_manifest_is_seen(tmp_path, ranks):
    path = write(tmp_path, ranks, 5, {"metrics": {"loss_g": 0.1, "logit_real/t0": -1.5e-7}})
    content = (path / MANIFEST).read_bytes()
    assert parse_manifest(content, path.name)["metrics"]["loss_g"] == 0.1
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 7
        try:
            found = parse_manifest(bytes(flipped), path.name)
        except ValueError:
            continue
        assert found == parse_manifest(content, path.name)  # a blank that became another blank


def test_a_pickle_in_place_of_a_shard_is_never_executed(tmp_path, ranks):
    path = write(tmp_path, ranks, 5)
    trap = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (trap,))

    torch.save(Trap(), path / "rank-00000.safetensors")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["rank-00000.safetensors"] = {
        "bytes": (path / "rank-00000.safetensors").stat().st_size,
        "sha256": hashlib.sha256((path / "rank-00000.safetensors").read_bytes()).hexdigest(),
    }
    del manifest["manifest_sha256"]
    (path / "manifest.json").write_bytes(encode_manifest(manifest))
    found = newest_valid(tmp_path)
    assert found  # an attacker who can write the folder can forge the manifest as well
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        found.section("generator")
    assert not trap.exists()
