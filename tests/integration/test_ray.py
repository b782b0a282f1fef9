"""The command on a real Ray: one it starts itself, and a cluster with a token that takes a submitted job."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.launch import ROOT, environment, run_python, running, train_command, wait_for_checkpoint
from trainer.checkpoint import list_checkpoints
from trainer.config_io import load_config
from trainer.run import STOPPED

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_finishes_the_same_mlflow_run(tiny, tmp_path):
    directory, log = tmp_path / "run", tmp_path / "log.txt"
    arguments = train_command(
        "digits", tiny, directory, "training.total_images=3200", "checkpoint.save_interval_steps=20"
    )
    with running(arguments, log) as process:
        wait_for_checkpoint(directory, process, log)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        assert process.wait(timeout=120) == STOPPED, log.read_text()[-3000:]
    text = log.read_text()
    assert "SIGINT: finishing the step and writing a checkpoint" in text
    assert "stopped; the same command resumes" in text
    assert "Traceback" not in text
    stopped_at = list_checkpoints(directory / "checkpoints")[-1].step
    assert 20 <= stopped_at < 200

    again = run_python(arguments)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"resuming from {directory}/checkpoints/step-{stopped_at:08d}" in again.stderr
    assert "finished: step 200, 3200 images" in again.stdout

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"
    points = [point.step for point in client.get_metric_history(run.info.run_id, "loss_g")]
    assert sorted(points) == list(range(4, 201, 4))  # no gap and no doubled point
    assert run.data.params["training.total_images"] == "3200"
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id, "snapshot")}
    assert artifacts == {"snapshot/config.yaml", "snapshot/generator.safetensors"}

    third = run_python(arguments)
    assert third.returncode == 0
    assert "finished: step 200" in third.stdout
    assert run_python([*arguments, "--resume", "never"]).returncode == 2


# As `timeout` and shell scripts are: a parent in the same process group, which lives on when the group is signalled.
PARENT = (
    "import signal, subprocess, sys; signal.signal(signal.SIGTERM, lambda *_: None); "
    "sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
)


def test_sigterm_to_the_whole_process_group_leaves_a_checkpoint_too(tiny, tmp_path):
    directory, log = tmp_path / "run", tmp_path / "log.txt"
    arguments = train_command(
        "digits", tiny, directory, "training.total_images=320_000", "checkpoint.save_interval_steps=20"
    )
    with running(["-c", PARENT, *arguments], log) as process:
        wait_for_checkpoint(directory, process, log)
        before = list_checkpoints(directory / "checkpoints")[-1].step
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=120) == STOPPED, log.read_text()[-3000:]
    text = log.read_text()
    assert "SIGTERM: finishing the step and writing a checkpoint" in text
    assert "stopped; the same command resumes" in text
    assert list_checkpoints(directory / "checkpoints")[-1].step >= before


def test_a_damaged_image_in_the_share_of_another_rank_ends_the_run_at_once(tiny, tiny_digits, tmp_path):
    data, log = tmp_path / "data", tmp_path / "log.txt"
    shutil.copytree(tiny_digits, data)
    (shard,) = data.glob("*.tar")
    content = shard.read_bytes()
    shard.write_bytes(content.replace(b"IDAT", b"IXXX"))  # of the same length, so that sizes do not tell
    arguments = train_command("digits", tiny, tmp_path / "run", f"data.path={data}", "data.verify=size")
    with running(arguments, log) as process:
        assert process.wait(timeout=120) == 2, log.read_text()[-3000:]
    text = log.read_text()
    assert "00000.tar" in text.splitlines()[-1]
    assert text.count("Started training worker group") == 1  # not tried again


def test_too_few_cpus_are_said_at_once(tiny, tmp_path):
    done = run_python(
        train_command("digits", tiny, tmp_path / "run", "scaling.world_size=4", "scaling.cpus_per_worker=64")
    )
    assert done.returncode == 2
    assert "room for 0 ranks of 64 CPUs each; the run asks for scaling.world_size 4. Lower" in done.stderr
    assert "Traceback" not in done.stderr


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def head(tmp_path) -> Iterator[dict[str, str]]:
    """A Ray head with token authentication; gives what a client needs in its environment."""
    token, port = secrets.token_hex(32), free_port()
    bin_folder = str(Path(sys.executable).parent)
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
    env = environment(settings | {"PATH": f"{bin_folder}:{os.environ['PATH']}"})
    arguments = ["start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={free_port()}"]
    arguments += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--disable-usage-stats"]
    with (tmp_path / "head.txt").open("w") as log:
        process = subprocess.Popen(
            [f"{bin_folder}/ray", *arguments], env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_for_dashboard(port, token, tmp_path / "head.txt")
            yield env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}"}
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def _wait_for_dashboard(port: int, token: str, log: Path) -> None:
    deadline = time.monotonic() + 90
    while True:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs/")
        request.add_header("Authorization", f"Bearer {token}")
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)


def submit(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    ray = str(Path(sys.executable).with_name("ray"))
    line = [ray, "job", "submit", "--working-dir", ".", "--", "python", "-m", "trainer.run", *arguments]
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_a_submitted_job_trains_and_a_relative_directory_is_refused(tiny, tmp_path, head):
    sets = [x for o in (*tiny, f"run.directory={tmp_path}/run", "training.total_images=160") for x in ("--set", o)]
    done = submit(head, "--config", "digits.yaml", *sets)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"checkpoint   {tmp_path}/run/checkpoints/step-00000010" in done.stdout
    assert [c.step for c in list_checkpoints(tmp_path / "run" / "checkpoints")] == [10]
    assert (tmp_path / "run" / "samples" / "step-00000010.png").exists()
    assert (tmp_path / "run" / "snapshots" / "step-00000010" / "generator.safetensors").exists()
    assert load_config(f"{tmp_path}/run/config.yaml").training.total_images == 160
    assert json.loads((tmp_path / "run/checkpoints/step-00000010/manifest.json").read_text())["world_size"] == 2

    relative = submit(head, "--config", "digits.yaml", *sets, "--set", "run.directory=runs/lost")
    assert relative.returncode != 0
    assert "run.directory is runs/lost, a relative path: inside a Ray job" in relative.stdout + relative.stderr

    stranger = {name: value for name, value in head.items() if name != "RAY_AUTH_TOKEN"}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{stranger['RAY_API_SERVER_ADDRESS']}/api/jobs/", timeout=10)
