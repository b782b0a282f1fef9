"""The table over T and z: its runs, its rows, and the runs that it does not repeat."""

import os
import signal
from pathlib import Path

import pytest

from tests.launch import exit_code, running, wait_for_checkpoint
from trainer import ablation
from trainer.ablation import Cell, cells_of
from trainer.checkpoint.format import list_checkpoints
from trainer.config.io import load_config
from trainer.evaluate import classifier


def test_every_t_comes_with_and_without_z_for_each_seed():
    cells = cells_of([1, 4], [0, 7])
    assert [(cell.num_timesteps, cell.latent, cell.seed) for cell in cells] == [
        (T, latent, seed) for T in (1, 4) for latent in (True, False) for seed in (0, 7)
    ]
    assert len({cell.name for cell in cells}) == len(cells)


def test_a_cell_sets_what_it_says():
    config = load_config("digits", Cell(num_timesteps=8, latent=False, seed=3).overrides)
    assert (config.diffusion.num_timesteps, config.generator.latent, config.run.seed) == (8, False, 3)


@pytest.mark.slow
def test_command_trains_each_run_once_and_writes_a_row_for_each(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(classifier, "TRAINING_STEPS", 20)
    table, runs = tmp_path / "table.md", tmp_path / "runs"
    sets = [word for text in (*tiny, "training.total_images=64", "engine.backend=torch") for word in ("--set", text)]
    given = ["--config", "digits", *sets, "--timesteps", "2", "--num", "40", "--runs", str(runs), "--out", str(table)]
    assert ablation.main(given) == 0
    header, _, *rows = table.read_text().splitlines()
    assert [row.split(" | ")[:3] for row in rows] == [["| 2", latent, "0"] for latent in ("yes", "no")]
    assert all(row.count("|") == header.count("|") and row.endswith(" s |") for row in rows)
    assert capfd.readouterr().out.splitlines() == rows
    steps = {folder.name: list_checkpoints(folder / "checkpoints")[-1].step for folder in runs.iterdir()}
    assert steps == {f"t2-{z}-seed0": 4 for z in ("z", "no-z")}
    assert ablation.main(given) == 0
    again = table.read_text().splitlines()[2:]
    assert [row.rsplit("|", 2)[0] for row in again] == [row.rsplit("|", 2)[0] for row in rows]
    assert all(row.endswith("| before |") for row in again)
    assert ablation.main([*given, "--set", "training.r1_gamma=9"]) == 2  # the existing runs have another config
    said = capfd.readouterr().err
    assert "training.r1_gamma: 0.2 -> 9" in said and "was refused, see above" in said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_the_step_that_is_under_way(tiny, tmp_path, number):
    more = ("training.total_images=1600000", "engine.backend=torch", "checkpoint.save_interval_steps=20")
    sets = [word for text in (*tiny, *more) for word in ("--set", text)]
    log, folder = tmp_path / "log.txt", tmp_path / "t2-z-seed0"
    given = ["-m", "trainer.ablation", "--config", "digits", *sets, "--timesteps", "2", "--runs", str(tmp_path)]
    with running([*given, "--out", str(tmp_path / "table.md")], log) as process:
        wait_for_checkpoint(folder, process, log)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)  # as a scheduler does
        assert process.wait(timeout=60) == (130 if number == signal.SIGINT else 1)
    text = log.read_text()
    assert "repeat the command to resume" in text and "Traceback" not in text
    saved = list_checkpoints(folder / "checkpoints")[-1]
    assert f"asked to stop: step {saved.step} is done" in text
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--num", "1"), "argument --num: '1' is given, allowed is a whole number of 2 or more"),
        (("--set", "checkpoint.directory=/elsewhere"), "checkpoint.directory is set"),
    ],
)
def test_what_a_table_cannot_be_made_with_is_said_before_anything_is_trained(tiny, tmp_path, capsys, more, told):
    sets = [word for text in tiny for word in ("--set", text)]
    given = ["--config", "digits", *sets, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "table.md")]
    assert exit_code(ablation.main, [*given, *more]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_wrong_config_is_refused_before_anything_is_trained(tmp_path, capsys):
    given = ["--config", "digits", "--set", "training.r1_gama=1", "--runs", str(tmp_path / "runs")]
    assert ablation.main([*given, "--out", str(tmp_path / "table.md")]) == 2
    assert "r1_gamma" in capsys.readouterr().err
    assert not Path(tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_that_ends_before_its_last_step_gets_no_row(tiny, tmp_path, monkeypatch, capsys):
    """Like a worker that was asked to stop: it ends with 0, with or without a checkpoint."""
    monkeypatch.setattr(ablation.sys, "executable", "true")
    sets = [word for text in tiny for word in ("--set", text)]
    given = ["--config", "digits", *sets, "--timesteps", "2", "--runs", str(tmp_path / "runs")]
    assert ablation.main([*given, "--out", str(tmp_path / "table.md")]) == 1
    assert "before it was finished: repeat the command to resume it" in capsys.readouterr().err
    assert not (tmp_path / "table.md").exists()
