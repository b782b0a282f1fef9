"""The sbatch line, and what the commands of a run ask Slurm; the real Slurm is in tests/integration."""

import shlex
import subprocess
from pathlib import Path

import pytest

from cluster.launch import main
from cluster.record import FOLDER, find, last_of
from tests.front_door import script
from tests.launch import ROOT

COMMAND = [
    "slurm",
    "--config",
    "lsun256",
    "--nodes",
    "2",
    "--gpus-per-node",
    "8",
    "--partition",
    "gpu",
    "--account",
    "me",
]

STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
env | grep -E '^(DDGAN|RAY)_' >>"$CALLS.env"
case "$(basename "$0")" in
    sbatch) echo "77;cluster" ;;
    squeue) printf '%s' "$STATE" ;;
    scontrol) echo "JobId=77 JobState=FAILED Reason=NonZeroExitCode ExitCode=2:0 Restarts=1" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """Stand-ins that record, for states that a real Slurm is slow to come to."""
    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        script(tmp_path / name, STAND_IN)
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("STATE", "")
    monkeypatch.setattr("cluster.record.FOLDER", tmp_path / "launches")
    return calls


def to(directory: Path) -> list[str]:
    return ["--", "--set", f"run.directory={directory}"]


def test_what_is_printed_is_what_sbatch_gets(slurm, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret-of-another-cluster")
    more = ["--time", "1-0", "--seeds", "0-3", "--modules", "a/1 b/2", "--max-requeues", "3", "--sbatch=--exclusive"]
    assert main([*COMMAND, *more, "--dry-run", *to(tmp_path / "run")]) == 0
    printed = shlex.split(capsys.readouterr().out)
    assert slurm.read_text() == "" and not (tmp_path / "run").exists()
    assert printed[:2] == ["DDGAN_MODULES=a/1 b/2", "DDGAN_MAX_REQUEUES=3"]
    assert main([*COMMAND, *more, *to(tmp_path / "run")]) == 0
    assert slurm.read_text().splitlines()[-1] == " ".join(printed[2:])
    for word in (
        "--nodes=2",
        "--gpus-per-node=8",
        "--cpus-per-task=8",
        "--partition=gpu",
        "--account=me",
        "--time=1-0",
    ):
        assert word in printed
    assert {"--array=0-3", "--exclusive", "--signal=TERM@180", f"--output={tmp_path}/run/slurm-%A_%a.log"} <= {*printed}
    assert printed[-5:] == ["lsun256", "--set", f"run.directory={tmp_path}/run", "--set", "scaling.world_size=16"]
    seen = Path(f"{slurm}.env").read_text()
    assert "DDGAN_MODULES=a/1 b/2" in seen and "secret" not in seen
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700, (
        "Slurm writes its log there, and does not make the folder"
    )


def test_a_run_in_the_queue_is_not_submitted_twice(slurm, tmp_path, capsys, monkeypatch):
    assert main([*COMMAND, *to(tmp_path / "run")]) == 0
    name = capsys.readouterr().err.splitlines()[0].split()[-1]
    monkeypatch.setenv("STATE", "RUNNING\n")
    assert main([*COMMAND, *to(tmp_path / "run")]) == 1
    assert (
        f"{name} is in the queue as job 77 (RUNNING): stop it with ./launch.sh stop {name}" in capsys.readouterr().err
    )
    monkeypatch.setenv("STATE", "")
    assert main([*COMMAND, *to(tmp_path / "run")]) == 0


def test_status_logs_and_stop_know_the_job(slurm, tmp_path, capfd, monkeypatch):
    main([*COMMAND, *to(tmp_path / "run")])
    capfd.readouterr()
    assert main(["status", str(tmp_path / "run")]) == 0
    assert "JobState FAILED  Reason NonZeroExitCode  ExitCode 2:0  Restarts 1" in capfd.readouterr().out
    assert main(["logs", "run"]) == 1
    assert "slurm-77.log does not exist yet: the job has not started" in capfd.readouterr().err
    (tmp_path / "run/slurm-77.log").write_text("what it said\n")
    assert main(["logs", "run"]) == 0
    assert capfd.readouterr().out == "what it said\n"
    assert main(["stop", "run"]) == 1
    assert "job 77 is no longer in the queue" in capfd.readouterr().err
    monkeypatch.setenv("STATE", "RUNNING\n")
    assert main(["stop", "run"]) == 0
    assert slurm.read_text().splitlines()[-1] == "scancel --signal=INT --state=RUNNING 77"
    monkeypatch.setenv("STATE", "PENDING\n")
    assert main(["stop", "run"]) == 0
    assert slurm.read_text().splitlines()[-1] == "scancel --state=PENDING 77"


def test_a_record_is_its_owners_and_found_by_each_of_its_names(slurm, tmp_path):
    main([*COMMAND, *to(tmp_path / "run")])
    (file,) = (tmp_path / "launches").glob("*.json")
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    record = last_of(file.stem)
    assert record and record == find("run") == find(str(tmp_path / "run")) == find(file.stem)
    main([*COMMAND, *to(tmp_path / "other" / "run")])
    assert main(["status", "run"]) == 2, "two runs are called so"
    assert main(["status", "nothing"]) == 2


def test_the_last_start_of_a_run_counts(slurm, tmp_path, monkeypatch, capsys):
    main([*COMMAND, *to(tmp_path / "run")])
    monkeypatch.setattr("cluster.launch.preflight.main", lambda _: 0)
    monkeypatch.setattr("cluster.launch.run.main", lambda _: 75)
    assert main(["train", "--config", "digits", *to(tmp_path / "run")]) == 75
    slurm.write_text("")
    assert main(["stop", str(tmp_path / "run")]) == 2
    assert f"no process on this machine trains in {tmp_path}/run" in capsys.readouterr().err
    assert slurm.read_text() == "", "the job of Slurm is over: nobody is asked"


def test_a_wrong_config_is_refused_before_slurm_is_asked(slurm, tmp_path, capsys):
    assert main([*COMMAND, *to(tmp_path / "run"), "--set", "training.r1_gama=1"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert slurm.read_text() == ""
    with pytest.raises(SystemExit) as ended:
        main(["slurm", "--config", "digits", "--nodes", "two"])
    assert ended.value.code == 2
    assert "'two' is given, allowed is a whole number of 1 or more" in capsys.readouterr().err
    assert main(["status", "run", "--", "x"]) == 2


def test_records_lie_where_git_and_ray_do_not_look():
    assert FOLDER.is_relative_to(ROOT / "runs")
    ignored = subprocess.run(["git", "check-ignore", "-q", str(FOLDER)], cwd=ROOT)
    assert ignored.returncode == 0


def test_the_script_is_a_script():
    assert subprocess.run(["bash", "-n", "cluster/slurm/job.sbatch"], cwd=ROOT).returncode == 0
