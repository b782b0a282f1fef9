"""The files for Ray: its autoscaler and its jobs take them, and what is submitted says what it takes along."""

import json
import re
import shlex
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from cluster.commands import ToolError
from cluster.launch import main
from cluster.ray import submit as ray
from tests.launch import ROOT

ADDRESS = "http://127.0.0.1:9"
COMMAND = ["ray", "--address", ADDRESS, "--config", "lsun256"]
ON_SHARED = ["--", "--set", "run.directory=/shared/runs/x", "--set", "data.path=/shared/data"]


def cluster_yaml() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster/ray/cluster.yaml").read_text())


def test_the_autoscaler_takes_the_cluster():
    prepared = prepare_config(cluster_yaml())
    validate_config(prepared)
    assert prepared["max_workers"] == 3
    broken = cluster_yaml() | {"head_start_ray_command": []}
    with pytest.raises(Exception, match="head_start_ray_command"):
        validate_config(broken)


def test_rays_jobs_take_the_runtime_environment():
    found = ray.runtime_env("abc")
    assert RuntimeEnv(**found).env_vars() == {"RAY_JOB_STOP_WAIT_TIME_S": "600", "DDGAN_GIT_COMMIT": "abc"}
    assert {"/datasets/", "/runs/", "/.venv/"} <= set(found["excludes"])


def test_what_is_printed_is_a_submission_of_the_checkout(capsys):
    assert main([*COMMAND, "--dry-run", *ON_SHARED]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:5] == ["ray", "job", "submit", "--address", ADDRESS]
    assert words[words.index("--working-dir") + 1] == str(ROOT)
    environment = json.loads(words[words.index("--runtime-env-json") + 1])
    assert environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "600"
    assert words[words.index("--") + 1 :] == ["python", "-m", "cluster.launch", "train", *COMMAND[3:], *ON_SHARED[1:]]


def test_without_a_token_nothing_is_submitted(capsys, monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([*COMMAND, *ON_SHARED]) == 1
    assert "no token for the cluster: put it into ~/.ray/auth_token (mode 600)" in capsys.readouterr().err
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    assert ray.client_environment()["RAY_AUTH_MODE"] == "token"


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    assert not ray.is_open(ADDRESS)
    with pytest.raises(ToolError, match="failed"):
        ray.run_tool(["ray", "job", "status", "--address", ADDRESS, "x"])


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("Job 'x' succeeded", "SUCCEEDED"),
        ("Job 'x' failed\nStatus message: Job entrypoint command failed with exit code 75", "FAILED"),
        ("Job 'x' was stopped", "STOPPED"),
        ("Status for job 'x': RUNNING\nStatus message: Job is currently running.", "RUNNING"),
        ("Status for job 'x': PENDING", "PENDING"),
    ],
)
def test_states_are_read_from_what_ray_prints(said, state, monkeypatch):
    monkeypatch.setattr(ray, "run_tool", lambda *_, **__: said)
    assert ray._state(ray.Record("x", "ray", "/x", "x"), {}) == state


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_jobs_find_the_python_that_ray_was_started_with(commands):
    """The entrypoint of a job says `python`: it is looked for on the PATH of `ray start`."""
    lines = [line for line in cluster_yaml()[commands] if "ray start" in line]
    assert lines
    for line in lines:
        found = re.search(r"PATH=(\S+):\$PATH .*?(\S+)/ray start", line)
        assert found and found[1] == found[2]
