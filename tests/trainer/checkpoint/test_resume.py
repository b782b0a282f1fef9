"""A run that has saved checkpoints never starts again from step 0 unless the user says so, and loses none of them."""

import argparse
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.checkpoint.saved import write
from tests.trainer.runs import configure
from trainer.checkpoint.format import list_checkpoints
from trainer.checkpoint.resume import HISTORY, Resume, ResumeError, choose, newest_to_resume, note_saved
from trainer.config.draft import ConfigError
from trainer.config.io import to_dict
from trainer.engine.ranks import Ranks


@pytest.fixture
def run(tiny, tmp_path):
    """The config of a run with checkpoints of steps 1, 2 and 3."""
    config = configure(tiny, tmp_path / "run")
    ranks = Ranks.join("cpu", 60)
    for step in (1, 2, 3):
        write(Path(config.run.directory) / "checkpoints", ranks, step, {"config": to_dict(config)})
    ranks.leave()
    note_saved(config, 3)
    return config


def steps(config) -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints(Path(config.run.directory) / "checkpoints")]


def newer_format(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "format_version": 2}))


def cut_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 100)


def no_parts(folder: Path) -> None:
    next(folder.glob("rank-*")).unlink()


def altered_part(folder: Path) -> None:
    file = next(folder.glob("rank-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "newer format": (newer_format, "format version 2, this program reads 1"),
    "manifest cut": (cut_manifest, "its manifest is damaged"),
    "no parts": (no_parts, r"rank-00000\.safetensors is missing"),
    "altered": (altered_part, "its SHA-256 differs"),
    "gone": (shutil.rmtree, r"has saved some, the last one of step 3 in .*checkpoints"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_run_none_of_whose_checkpoints_can_be_taken_up_is_refused(run, kind):
    damage, told = DAMAGE[kind]
    for folder in list((Path(run.run.directory) / "checkpoints").iterdir()):
        damage(folder)
    with pytest.raises(ResumeError, match=told) as refusal:
        newest_to_resume(run, fetch=True)
    assert "--resume from:STEP" in str(refusal.value) and "--resume restart" in str(refusal.value)
    if kind != "gone":
        assert all(f"step-0000000{step}: " in str(refusal.value) for step in (1, 2, 3))


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", ["manifest.json", "rank-00000.safetensors", "checkpoints"])
def test_newest_that_cannot_be_read_now_is_no_reason_to_take_an_older_one(run, monkeypatch, code, name):
    def failing(real):
        def call(path, *arguments, **more):
            if str(path).endswith((f"step-00000003/{name}", f"run/{name}")):
                raise OSError(code, os.strerror(code))
            return real(path, *arguments, **more)

        return call

    monkeypatch.setattr(Path, "read_bytes", failing(Path.read_bytes))
    monkeypatch.setattr("trainer.checkpoint.format.sha256_of", failing(open))
    monkeypatch.setattr(os, "scandir", failing(os.scandir))
    with pytest.raises(Exception, match=f"cannot be read.*{os.strerror(code)}"):
        newest_to_resume(run, fetch=True)


def test_damaged_newest_gives_way_to_the_one_before(run):
    altered_part(Path(run.run.directory) / "checkpoints" / "step-00000003")
    found = newest_to_resume(run, fetch=True)
    assert found and found.step == 2


def test_run_without_checkpoints_starts_from_step_0(tiny, tmp_path):
    (tmp_path / "checkpoints" / "step-00000005").mkdir(parents=True)  # its first save was killed
    assert newest_to_resume(configure(tiny, tmp_path), fetch=True) is None


def test_damaged_history_still_says_that_there_was_one(run):
    shutil.rmtree(Path(run.run.directory) / "checkpoints")
    (Path(run.run.directory) / HISTORY).write_bytes(b"\xff[")
    with pytest.raises(ResumeError, match="an unknown step"):
        newest_to_resume(run, fetch=True)


@pytest.mark.parametrize("text, left, aside", [("restart", [], [1, 2, 3]), ("from:1", [1], [2, 3])])
def test_other_checkpoints_are_moved_aside_and_none_is_lost(run, text, left, aside):
    cut_manifest(Path(run.run.directory) / "checkpoints" / "step-00000003")
    newest, move_others_aside = choose(run, Resume.parse(text))
    assert (newest.step if newest else None) == (left[0] if left else None)
    assert steps(run) == [1, 2], "nothing is moved before all is checked"
    move_others_aside()
    assert steps(run) == left
    (folder,) = (Path(run.run.directory) / "checkpoints").glob("aside-*")
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{step}" for step in aside]
    found = newest_to_resume(run, fetch=True)
    assert (found.step if found else None) == (left[0] if left else None)


def test_step_that_is_not_there_is_refused_with_those_that_are(run):
    with pytest.raises(ConfigError, match=r"no checkpoint of step 7; it has \[1, 2, 3\]"):
        choose(run, Resume.parse("from:7"))


@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_command_that_a_scheduler_repeats_does_not_restart_the_run_again(run, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    newest, move_others_aside = choose(run, Resume.parse("restart"))
    move_others_aside()
    assert newest and newest.step == 3 and steps(run) == [1, 2, 3]


@pytest.mark.parametrize("text", ["", "from", "from:", "from:-1", "from:x", "from:²", "Auto", "from:" + "9" * 99])
def test_other_words_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="allowed are auto, never, restart and from:STEP"):
        Resume.parse(text)
