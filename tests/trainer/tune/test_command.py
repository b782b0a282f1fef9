"""The command of the search: its table, the file that it writes, and how it ends."""

import json
import shlex

import pytest

from tests.trainer.bench.in_process import InProcess
from trainer.bench.trial import Ended
from trainer.config.io import load_config
from trainer.tune import command
from trainer.tune.candidates import Machine
from trainer.tune.command import main

MEASURED = {"mfu": 0.5, "peak_memory_gib": 2.0, "first_step_s": 3.0, "time/data_s": 0.0, "time/d_s": 1.0}


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(Machine, "here", lambda: Machine(cpus=1, gpus=0))
    monkeypatch.setattr(command, "count_flops", lambda config: 1.0)
    return InProcess(monkeypatch)


def arguments(tiny: tuple[str, ...], *more: str) -> list[str]:
    words = [word for setting in (*tiny, "scaling.world_size=1") for word in ("--set", setting)]
    return ["--config", "digits", "--minutes", "60", *words, *more]


def speeds(arguments: list[str]) -> Ended:
    """Twice as fast with the torch engine; with half the batch, memory runs out."""
    if "training.micro_batch_size=8" in arguments:
        return Ended(-9, "", 1.0)
    rate = 200.0 if "engine.backend=torch" in arguments else 100.0
    return Ended(0, json.dumps(MEASURED | {"images_per_s": rate}), 1.0)


def test_rows_and_the_best_settings_are_shown_and_the_file_trains_with_them(tiny, tmp_path, trials, capsys):
    trials.fails = speeds
    file = tmp_path / "best.yaml"
    assert main(arguments(tiny, "--write", str(file))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["images/s", "MFU", "GB", "1st", "step", "settings"]
    assert lines[2].split() == ["100", "50.0%", "2.00", "3.0", "s", "as", "given"]
    assert "training.micro_batch_size=8: out of memory" in "\n".join(lines)
    assert next(line for line in lines if line.endswith("engine.backend=torch  <- best so far"))
    assert lines[-2].endswith("engine.backend=torch (200 images/s, 2.00 times as given)")
    assert lines[-1] == f"train with them: python -m trainer.run --config {file}"
    assert load_config(shlex.split(lines[-1])[-1]) == load_config(
        "digits", [*tiny, "scaling.world_size=1", "scaling.device=cpu", "engine.backend=torch"]
    )
    assert "#   --set engine.backend=torch\n" in file.read_text()


def test_ctrl_c_shows_and_keeps_the_best_so_far(tiny, tmp_path, trials, capsys):
    def stopped(arguments: list[str]) -> Ended:
        if len(trials.commands) == 6:
            raise KeyboardInterrupt
        return speeds(arguments)

    trials.fails = stopped
    file = tmp_path / "best.yaml"
    assert main(arguments(tiny, "--write", str(file))) == 130
    printed = capsys.readouterr()
    assert "train with them: " in printed.out
    assert "stopped; the best settings so far are above" in printed.err
    assert load_config(str(file)).scaling.device == "cpu"


def test_config_that_cannot_be_measured_ends_with_its_reason(tiny, trials, capsys):
    trials.fails = lambda arguments: Ended(1, "", 1.0)
    assert main(arguments(tiny)) == 1
    assert "nothing could be measured: exit code 1, and no message. Give more --minutes" in capsys.readouterr().err


def test_settings_that_change_the_result_are_marked():
    assert command.in_words({"training.precision": "bf16", "engine.compile": True}) == (
        "training.precision=bf16* engine.compile=true"
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--write", "best.txt"), "--write is best.txt: give the name of a file that ends in .yaml"),
        (("--write", "no/folder/best.yaml"), "in a folder that exists"),
        (("--set", "data.path=/nowhere"), "no prepared data set"),
        (("--set", "training.batch=3"), "training.batch"),
        (("--set", "scaling.device=gpu"), "torch finds none on this machine"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_trial(tiny, trials, capsys, more, words):
    assert main(arguments(tiny, *more)) == 2
    assert words in capsys.readouterr().err
    assert not trials.commands


@pytest.mark.slow
def test_a_trial_really_measures(tiny, trials, capsys):
    def only_the_first(arguments: list[str]) -> Ended | None:
        return None if len(trials.commands) == 1 else Ended(1, "", 1.0)

    trials.fails = only_the_first
    assert main(arguments(tiny, "--set", "engine.backend=torch")) == 0
    assert "as given" in capsys.readouterr().out.splitlines()[2]
