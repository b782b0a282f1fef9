"""The runs of a sweep and what is refused before any of them starts."""

import re
from pathlib import Path

import pytest

from cluster.sweep.combinations import make_runs, varied
from cluster.sweep.command import main
from cluster.sweep.table import note_stopped, stopped_by_asha, table_of
from tests.launch import exit_code
from trainer.checkpoint.storage import storage_of
from trainer.config.draft import ConfigError

BASE = ("run.directory=/shared/runs/x", "data.path=/shared/data")


def test_every_combination_is_a_run_in_a_folder_of_its_own():
    vary = [varied("training.r1_gamma=0.02,0.1"), varied("run.seed=0-2")]
    runs = make_runs("digits", [], BASE, vary)
    assert [run.name for run in runs] == [f"r1_gamma-{gamma}-seed-{n}" for gamma in ("0.02", "0.1") for n in range(3)]
    first, last = runs[0].config, runs[-1].config
    assert first.run.directory == "/shared/runs/x/r1_gamma-0.02-seed-0"
    assert (last.training.r1_gamma, last.run.seed) == (0.1, 2)
    assert runs[-1].arguments[:2] == ("--config", "digits")
    assert runs[-1].arguments[-4:] == (
        "--set",
        f"run.directory={runs[-1].directory}",
        "--set",
        "data.path=/shared/data",
    )


def test_a_value_may_be_a_list_and_settings_with_one_last_name_keep_their_sections():
    assert varied("generator.channel_multipliers=[1, 2],[1, 2, 2]")[1] == ("[1, 2]", "[1, 2, 2]")
    vary = [varied(f"training.learning_rate_{part}.peak=1e-4,2e-4") for part in "gd"]
    names = {run.name for run in make_runs("digits", [], BASE, vary)}
    assert len(names) == 4
    assert "training-learning_rate_g-peak-1e-4-training-learning_rate_d-peak-2e-4" in names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vary", "run.seed"], "allowed is a setting with values: run.seed=0,1,2 or 0-2"),
        (["--vary", "run.seed="], "has an empty value: give the values of run.seed"),
        (["--vary", "training.r1_gamma=0.1,,0.2"], "has an empty value"),
        (["--vary", "run.seed=1,0-2"], "has the value 1 twice"),
        (["--vary", "run.seed=2-0"], "allowed are whole numbers and ranges"),
        (["--vary", "run.directory=a,b"], "run.directory cannot be varied"),
        (["--vary", "run.seed=0-1", "--vary", "run.seed=2"], "--vary run.seed is given twice"),
        (["--vary", "run.seed=0,1", "--set", "run.seed=3"], "run.seed is given by --vary and by --set"),
        (["--vary", "run.seed=0-1000"], "make 1001 runs, more than 1000"),
        (["--vary", "training.r1_gama=0.1,0.2"], "--vary training.r1_gama=0.2: training.r1_gama is unknown; did you"),
        (
            ["--vary", "training.r1_gamma=0.1,-1", "--vary", "run.seed=0-1"],
            "--vary training.r1_gamma=-1: training.r1_gamma must be a number >= 0, or a mapping with the keys start, "
            "end, decay_images, got -1 (in r1_gamma--1-seed-0, r1_gamma--1-seed-1)",
        ),
        (["--vary", "run.seed=0,1", "--set", "checkpoint.directory=/c"], "each run keeps its checkpoints in a folder"),
        (["--vary", "run.seed=0,1", "--asha", "quality"], "--asha is quality; allowed are figures of evaluations:"),
        (
            ["--vary", "run.seed=0,1", "--asha", "fid", "--set", "evaluation.interval_images=null"],
            "checkpoint.keep_best is fid, which an evaluation measures, but",
        ),
    ],
)
def test_a_mistake_is_named_before_anything_starts(words, message, tmp_path, capsys):
    base = ["--config", "digits", "--set", f"run.directory={tmp_path}/runs", "--set", "data.path=/nowhere"]
    assert exit_code(main, [*base, *words]) == 2
    assert re.sub(r"\s+", " ", message) in re.sub(r"\s+", " ", capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_values_that_differ_only_in_signs_would_share_a_folder():
    with pytest.raises(ConfigError, match=r"would both be in /shared/runs/x/channel_multipliers-_1_2_"):
        make_runs("digits", [], BASE, [varied("generator.channel_multipliers=[1, 2],[1,2]")])


def test_the_table_has_a_row_for_each_run(tmp_path: Path):
    runs = make_runs("digits", [], (f"run.directory={tmp_path}", "data.path=/d"), [varied("run.seed=0,1")])
    assert table_of(runs).splitlines() == [
        "| run.seed | state | images | loss_g | loss_d_real | loss_d_fake |",
        "|---|---|---|---|---|---|",
        "| 0 | not started | 0 |  |  |  |",
        "| 1 | not started | 0 |  |  |  |",
    ]
    assert not storage_of(runs[0].config).list()


def test_a_run_that_asha_has_stopped_is_not_started_again(tmp_path: Path):
    runs = make_runs("digits", [], (f"run.directory={tmp_path}", "data.path=/d"), [varied("run.seed=0,1")])
    runs[1].directory.mkdir()
    note_stopped(runs[1], "fid", 12.0, 320)
    assert [stopped_by_asha(run) for run in runs] == [False, True]


def test_dry_run_prints_the_command_of_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = ["--config", "digits", "--set", f"run.directory={tmp_path}/runs", "--set", "data.path=/d"]
    assert main([*base, "--vary", "run.seed=0-1", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" --config ")[0] for line in lines] == ["python -m trainer.run"] * 2
    assert f"--set run.directory={tmp_path}/runs/seed-1" in lines[1]
