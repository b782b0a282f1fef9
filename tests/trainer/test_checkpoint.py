"""A checkpoint is all or nothing, and is read by ranges whoever wrote it."""

import errno
import json
from pathlib import Path

import pytest
import torch

from trainer import checkpoint as module
from trainer.checkpoint import Checkpoint, CheckpointError, list_checkpoints, newest_valid, prune, save
from trainer.engines import Fragment
from trainer.ranks import Ranks

MANIFEST = {"config": {}}


@pytest.fixture
def ranks():
    joined = Ranks.join("cpu", 60)
    yield joined
    joined.leave()


def fragments(start: int = 0, stop: int = 10) -> list[Fragment]:
    return [Fragment("layer.weight", start, {"parameter": torch.arange(start, stop, dtype=torch.float32)})]


def write(folder: Path, ranks: Ranks, step: int) -> Path:
    extras = {"statistics": {"loss": torch.tensor(float(step))}}
    return save(folder, ranks, step, {"generator": fragments()}, extras, MANIFEST)


def test_what_was_saved_is_read_by_ranges(tmp_path, ranks):
    write(tmp_path, ranks, 5)
    found = newest_valid(tmp_path)
    assert found
    section = found.section("generator")
    assert section.read("parameter", "layer.weight", 3, 7).tolist() == [3, 4, 5, 6]
    assert found.extras("statistics", 0) == {"loss": torch.tensor(5.0)}


def test_ranges_are_joined_across_the_files_of_ranks(tmp_path):
    for rank, (start, stop) in enumerate([(0, 3), (3, 8), (8, 10)]):
        module._write_fragments(tmp_path / f"rank-{rank:05d}.safetensors", {"generator": fragments(start, stop)}, {})
    files = {file.name: {} for file in tmp_path.iterdir()}
    section = Checkpoint(tmp_path, {"step": 1, "files": files}).section("generator")
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


def test_full_disk_leaves_the_earlier_checkpoints_and_nothing_else(tmp_path, ranks, monkeypatch):
    write(tmp_path, ranks, 5)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        CheckpointError, match=r"checkpoint of step 6 was not saved: rank 0 cannot write .*No space left"
    ):
        write(tmp_path, ranks, 6)
    assert [c.step for c in list_checkpoints(tmp_path)] == [5]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_folder_without_a_manifest_is_no_checkpoint_and_is_written_over(tmp_path, ranks):
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000007" / "rank-00009.safetensors").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    write(tmp_path, ranks, 7)
    found = newest_valid(tmp_path)
    assert found
    assert {p.name for p in found.path.iterdir()} == {"manifest.json", "rank-00000.safetensors"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 99}', '{"format_version": 1}'])
def test_unreadable_manifest_is_named_and_passed_over(tmp_path, ranks, caplog, content):
    write(tmp_path, ranks, 5)
    bad = tmp_path / "step-00000009"
    bad.mkdir()
    (bad / "manifest.json").write_text(content)
    assert [c.step for c in list_checkpoints(tmp_path)] == [5]
    assert str(bad) in caplog.text


def test_prune_keeps_the_newest(tmp_path, ranks):
    for step in (1, 2, 3, 4):
        write(tmp_path, ranks, step)
    prune(tmp_path, 2, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_prune_never_counts_what_lies_beyond_the_checkpoint_just_written(tmp_path, ranks):
    for step in (100, 150, 200, 300):
        write(tmp_path, ranks, step)
    (tmp_path / "step-00000120").mkdir()  # a save that was killed
    prune(tmp_path, 1, 150)  # the run resumed from 100, because 200 and 300 were damaged
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000150"]


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
        "sha256": module._sha256(path / "rank-00000.safetensors"),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    found = newest_valid(tmp_path)
    assert found  # an attacker who can write the folder can forge the manifest as well
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        found.section("generator")
    assert not trap.exists()
