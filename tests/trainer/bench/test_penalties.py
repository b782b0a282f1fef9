"""The comparison of both penalties, on a run of ten steps."""

import json

import pytest

from tests.launch import exit_code
from tests.trainer.runs import configure, train
from trainer.bench import penalties
from trainer.bench.command import main


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("penalties") / "run"
    train(configure(tiny, directory))
    return directory


@pytest.mark.slow
def test_value_in_float32_is_that_of_the_exact_penalty_and_in_bf16_it_is_rounding(run, capsys, monkeypatch):
    monkeypatch.setattr(penalties, "EPSILONS", (0.001, 0.03))
    assert main(["penalties", "--run", str(run), "--batch-size", "16", "--noises", "64", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exact"] > 0
    rows = {(row["precision"], row["epsilon"]): row for row in report["errors"]}
    good, rounded = rows["fp32", 0.03], rows["bf16", 0.001]
    assert good["value"] == pytest.approx(1.0, abs=0.2)  # 64 noises in 16 images: 4% and its curvature
    assert rounded["value"] > 2


def test_the_table_has_a_row_for_each(run, capsys, monkeypatch):
    monkeypatch.setattr(penalties, "EPSILONS", (0.01,))
    assert main(["penalties", "--run", str(run), "--batch-size", "4", "--noises", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[:2] for line in lines[-2:]] == [["| fp32", "0.01"], ["| bf16", "0.01"]]


def test_a_folder_without_a_run_ends_with_2(tmp_path, capsys):
    assert exit_code(main, ["penalties", "--run", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_batch_that_splits_a_group_is_refused_with_the_size_of_the_groups(run, capsys):
    assert exit_code(main, ["penalties", "--run", str(run), "--batch-size", "6"]) == 2
    assert "--batch-size is 6, but the minibatch deviation of this run compares groups of 4" in capsys.readouterr().err
