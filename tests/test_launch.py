"""The commands of launch.sh: their arguments, and the programs they start."""

import os
from pathlib import Path

import pytest

from tests.front_door import Machine, script
from tests.launch import ROOT

COMMANDS = (
    "quickstart",
    "train",
    "sweep",
    "slurm",
    "ray",
    "kubernetes",
    "status",
    "logs",
    "stop",
    "test",
    "ui",
    "help",
)
LISTED = ", ".join(COMMANDS)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def ready(machine: Machine) -> Machine:
    machine.finish_set_up()
    return machine


# ---- arguments ----


@pytest.mark.parametrize("arguments", [["help"], ["--help"], ["-h"], ["quickstart", "--help"], ["test", "-h"]])
def test_help_explains_every_command_without_set_up(machine: Machine, arguments: list[str]) -> None:
    code, output, errors = machine.launch(*arguments)
    assert (code, errors, machine.calls()) == (0, "", [])
    explained = {line.split()[0] for line in output.splitlines() if line.startswith("  ") and line[2] != " "}
    assert explained >= set(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], f"no command is given; allowed are {LISTED}"),
        (["quickstrat"], f"unknown command quickstrat; allowed are {LISTED}"),
        (["--config", "digits"], f"unknown option --config; first comes a command: {LISTED}"),
        (["quickstart", "--fast"], "quickstart takes no arguments, but --fast is given"),
        (["train"], "train needs arguments, such as: ./launch.sh train --config digits"),
        (["sweep"], "sweep needs arguments: ./launch.sh sweep --help"),
        (["slurm"], "slurm needs arguments: ./launch.sh slurm --help"),
        (["stop"], "stop needs a run, such as: ./launch.sh stop runs/mine"),
        (["ui", "--prt", "5001"], "ui does not know --prt; allowed is --port PORT"),
        (["ui", "--port"], "--port needs a number from 1024 to 65535"),
        (["ui", "--port", "80"], "--port is 80; allowed is a number from 1024 to 65535"),
        (["ui", "--port=5x"], "--port is 5x; allowed is a number from 1024 to 65535"),
        (["ui", "--port", "5000", "x"], "ui does not know x; allowed is --port PORT"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(machine: Machine, arguments: list[str], words: str) -> None:
    assert machine.launch(*arguments) == (2, "", f"launch.sh: {words}\n")
    assert machine.calls() == [], "nothing is set up for a wrong command"


# ---- programs started by the commands ----


def test_quickstart_prepares_trains_evaluates_and_says_where_things_are(ready: Machine) -> None:
    code, output, _ = ready.launch("quickstart", RECORD="1", MLFLOW_TRACKING_URI="")
    root = ready.checkout
    assert code == 0
    assert ready.calls()[-3:] == [
        f"{root}: [data.prepare] [digits] [--out] [datasets/digits]",
        f"{root}: [trainer.run] [--config] [digits-fast]",
        f"{root}: [trainer.evaluate] [--run] [runs/digits-fast] [--reference] [datasets/digits] "
        "[--picture] [runs/digits-fast/picture.png]",
    ]
    for place in ("digits-fast/picture.png", "digits-fast/samples", "digits-fast/checkpoints", "mlflow.db"):
        assert f"{root}/runs/{place}" in output


def test_quickstart_evaluates_no_run_that_was_stopped(ready: Machine) -> None:
    stop = "if [[ $2 = trainer.run ]]; then exit 75; fi"
    code, output, errors = ready.launch("quickstart", RECORD="1", ON_RUN=stop)
    assert (code, output) == (75, "")
    assert errors.endswith("launch.sh: training was stopped before its end; the same command resumes it\n")
    assert "trainer.run" in ready.calls()[-1]


@pytest.mark.parametrize(("program", "command"), [("launch.sh", ["test"]), (".ci/run", [])])
def test_test_lints_checks_types_and_runs_the_suite(ready: Machine, program: str, command: list[str]) -> None:
    # All Debian packages are present, so nothing is installed.
    script(ready.elsewhere / "dpkg-query", "#!/bin/sh\necho installed\n")
    path = f"{ready.elsewhere}:{os.environ['PATH']}"
    code, _, errors = ready.launch(*command, "-m", "not slow", program=program, RECORD="1", PATH=path)
    assert code == 0, errors
    calls = ready.calls()
    lints = ("[ruff] [check] [.]", "[ruff] [format] [--check] [.]")
    assert calls[-4:-2] == [f"{ready.checkout}: {words}" for words in lints]
    assert set(calls[-2:]) == {  # run in parallel
        f"{ready.checkout}: [pyright] [--pythonpath] [{ready.venv}/bin/python]",
        f"{ready.checkout}: [pytest] [-n] [3] [-m] [not slow]",
    }


def test_test_ends_with_the_closing_line_of_pytest(ready: Machine) -> None:
    late = "case $2 in pyright) sleep 0.2; echo 0 errors ;; pytest) echo 7 passed ;; esac"
    assert ready.launch("test", RECORD="1", ON_RUN=late)[:2] == (0, "7 passed\n")


@pytest.mark.parametrize("failing", ["ruff", "pyright", "pytest"])
def test_test_fails_with_each_of_its_checks(ready: Machine, failing: str) -> None:
    wrong = f"if [[ $2 = {failing} ]]; then echo {failing} says no; exit 1; fi"
    code, output, errors = ready.launch("test", RECORD="1", ON_RUN=wrong)
    assert code == 1
    assert f"{failing} says no" in output + errors
    assert any("[pytest]" in call for call in ready.calls()) == (failing != "ruff")


def test_sweep_is_passed_on(ready: Machine) -> None:
    ready.launch("sweep", "--config", "digits", "--vary", "run.seed=0-2", RECORD="1")
    assert ready.calls()[-1] == f"{ready.checkout}: [cluster.sweep] [--config] [digits] [--vary] [run.seed=0-2]"


@pytest.mark.parametrize("command", ["train", "slurm", "ray", "kubernetes", "status", "logs", "stop"])
def test_launchers_get_their_arguments_as_they_are_given(ready: Machine, command: str) -> None:
    assert ready.launch(command, "a b", "--", "--set", "x=*", RECORD="1")[0] == 0
    assert ready.calls()[-1] == f"{ready.checkout}: [cluster.launch] [{command}] [a b] [--] [--set] [x=*]"


@pytest.mark.slow
def test_train_runs_from_another_current_directory(machine: Machine, tmp_path: Path) -> None:
    machine.checkout = ROOT
    arguments = ["train", "--config", "digits", "--dry-run"]
    code, output, errors = machine.launch(*arguments, DDGAN_VENV=str(tmp_path / "venv"))
    assert code == 0, errors
    assert "global_batch_size: 32" in output


def test_exit_code_is_that_of_what_failed_and_nothing_follows(ready: Machine) -> None:
    assert ready.launch("train", "--config", "digits", RECORD="1", ON_RUN="exit 7")[0] == 7
    ready.calls()
    code, output, _ = ready.launch("quickstart", RECORD="1", ON_RUN="if [[ $2 = trainer.run ]]; then exit 3; fi")
    assert (code, output) == (3, "")
    assert "trainer.run" in ready.calls()[-1]


# ---- ui ----


def test_ui_hands_over_to_the_program_that_asks_for_a_password(ready: Machine) -> None:
    assert ready.launch("ui", RECORD="1")[0] == 0
    assert ready.launch("ui", "--port", "5001", RECORD="1")[0] == 0
    calls = [line.partition(": ")[2] for line in ready.calls()]
    assert calls == [f"[cluster.store_ui] [--port] [{port}]" for port in (5000, 5001)]
