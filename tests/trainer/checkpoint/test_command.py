"""The command that lists, verifies, prunes, converts and exports checkpoints."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.launch import run_python
from tests.trainer.runs import Stopper, configure, state_of, train
from trainer.checkpoint.command import main
from trainer.checkpoint.format import list_checkpoints, newest_valid
from trainer.checkpoint.lease import Holder, this_process
from trainer.checkpoint.lease_places import FolderLease
from trainer.checkpoint.whole import whole_extras, whole_states
from trainer.sample.draw import sample_run


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    train(configure(tiny, directory, "checkpoint.save_interval_steps=3", "checkpoint.keep_last=9"), Stopper(8))
    return directory


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A run with checkpoints of steps 3, 6 and 8."""
    return shutil.copytree(trained, tmp_path / "run")


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def part(run: Path, step: int) -> Path:
    (file,) = (run / "checkpoints" / f"step-{step:08d}").glob("rank-00000-*.safetensors")
    return file


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(run / "checkpoints")]


@pytest.mark.slow
def test_list_shows_what_is_there_and_what_is_not_whole(run, capsys):
    part(run, 6).unlink()
    (run / "checkpoints" / "step-00000006.bak").mkdir()
    (run / "checkpoints" / "step-00000007").write_text("no folder")
    (run / "checkpoints" / "step-00000009").mkdir()
    assert main(["list", str(run)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["step", "images", "ranks", "ZeRO", "g/d", "MB", "created", "files"]
    assert [line[0] for line in lines[1:]] == ["3", "6", "8", "9"]
    assert lines[1][1:4] == ["48", "1", "0/0"] and lines[1][-2:] == ["all", "there"]
    assert lines[2][-1] == "missing"
    assert lines[4][-5:] == ["no", "valid", "manifest:", "no", "checkpoint"]
    assert main(["list", str(run / "checkpoints")]) == 0  # the folder itself


def test_verify_names_the_bad_one_with_code_1(run, capsys):
    assert main(["verify", str(run)]) == 0
    flip_a_byte(part(run, 6))
    assert main(["verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()[3:]
    assert lines[0] == "step-00000003  good"
    assert lines[1].startswith("step-00000006  BAD: ") and "SHA-256 differs" in lines[1]
    os.truncate(run / "checkpoints" / "step-00000006" / "manifest.json", 20)
    assert main(["verify", str(run)]) == 1


def test_prune_keeps_what_it_is_told_and_the_newest_valid_one(run, capsys):
    flip_a_byte(part(run, 8))
    before = sorted(run.rglob("*"))
    assert main(["prune", str(run), "--keep-last", "1", "--dry-run"]) == 0
    assert sorted(run.rglob("*")) == before
    assert "would delete" in capsys.readouterr().out
    assert main(["prune", str(run), "--keep-last", "1"]) == 0
    assert steps(run) == [6, 8]
    found = newest_valid(run / "checkpoints")
    assert found and found.step == 6
    flip_a_byte(part(run, 6))
    assert main(["prune", str(run), "--keep-last", "1"]) == 2
    assert "holds no valid checkpoint: nothing is deleted" in capsys.readouterr().err
    assert steps(run) == [6, 8]


def test_prune_is_refused_while_the_run_is_alive(run, capsys):
    parent = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    alive = f"{this_process().split()[0]} {os.getppid()} {parent}"
    assert FolderLease(run / "checkpoints").swap(None, Holder("other", alive, "t", "node7", os.getppid(), "").encode())
    assert main(["prune", str(run), "--keep-last", "1"]) == 2
    assert f"{run}/checkpoints is in use by another run" in capsys.readouterr().err
    assert steps(run) == [3, 6, 8]


@pytest.mark.slow
def test_converted_checkpoint_is_one_file_with_the_same_state(run, tiny, tmp_path, capsys):
    assert main(["convert", str(run), "--step", "6", "--out", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/one/step-00000006\n"
    (source,) = [c for c in list_checkpoints(run / "checkpoints") if c.step == 6]
    (target,) = list_checkpoints(tmp_path / "one")
    target.verify()
    assert (target.manifest["world_size"], target.manifest["images"]) == (1, 96)
    assert list(target.manifest["files"]) == ["rank-00000.safetensors"]
    for read in (whole_states, whole_extras):
        before, after = read(source), read(target)
        assert before.keys() == after.keys() and before
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert main(["convert", str(run), "--step", "6", "--out", str(tmp_path / "one")]) == 2
    assert "exists already: choose another --out" in capsys.readouterr().err
    (tmp_path / "again").mkdir()
    (tmp_path / "one").rename(tmp_path / "again" / "checkpoints")
    train(configure(tiny, tmp_path / "again"))
    train(configure(tiny, run))
    assert all(torch.equal(a, state_of(run, 10)[k]) for k, a in state_of(tmp_path / "again", 10).items())


def test_exported_generator_draws_the_images_of_the_run(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "generator")]) == 0
    assert sorted(p.name for p in (tmp_path / "generator").iterdir()) == ["config.yaml", "generator.safetensors"]
    assert torch.equal(sample_run(tmp_path / "generator", 4, 0), sample_run(run, 4, 0))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["list", "/nowhere"], "/nowhere: there is no such folder"),
        (["list", "pipe:touch x"], "pipe: is no storage"),
        (["export", "{empty}", "--out", "{empty}/x"], "{empty} holds no valid checkpoint yet"),
        (["convert", "{empty}", "--step", "7", "--out", "{empty}/x"], "has no checkpoint of step 7; it has none"),
        (["prune", "{empty}"], "holds no checkpoint: nothing is deleted"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line_with_code_2(tmp_path, capsys, arguments, told):
    assert main([a.format(empty=tmp_path) for a in arguments]) == 2
    err = capsys.readouterr().err
    assert told.format(empty=tmp_path) in err and err.count("\n") == 1


@pytest.mark.slow
def test_it_is_the_command_of_the_module(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "manifest.json").write_text(json.dumps({"format_version": 99}))
    done = run_python(["-m", "trainer.checkpoint", "verify", str(tmp_path)])
    assert done.returncode == 1, done.stderr
    assert "step-00000001  no valid manifest" in done.stdout
    assert "format version 99, this program reads 1" in done.stderr
