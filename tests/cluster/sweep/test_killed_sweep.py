"""A sweep on a real Ray that is killed ends, given again, with the table of runs that nothing disturbed."""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster.slurm.ports import reserve_ports
from cluster.sweep.combinations import make_runs, varied
from cluster.sweep.table import table_of
from tests.launch import ROOT, environment, slow_steps
from tests.trainer.runs import train
from trainer.checkpoint.format import list_checkpoints

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ADDRESS = "127.0.0.1"
VARY = ("training.r1_gamma=0.02,0.1", "run.seed=1")


@pytest.fixture
def ray_environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of a Ray with one CPU that outlives a sweep; each step of a run in it takes a while."""
    port, dashboard = reserve_ports(ADDRESS, 2)
    env = environment(
        {
            **slow_steps(0.4),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_API_SERVER_ADDRESS": f"http://{ADDRESS}:{dashboard}",
            "DDGAN_TEST": str(tmp_path),
        }
    )
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as scratch:
        start = ["ray", "start", "--head", "--node-ip-address", ADDRESS, "--port", str(port), "--num-cpus", "1"]
        start += ["--dashboard-port", str(dashboard), "--temp-dir", scratch, "--disable-usage-stats"]
        try:
            subprocess.run(start, env=env, check=True, capture_output=True, timeout=120)
            yield env | {"RAY_ADDRESS": f"{ADDRESS}:{port}"}
        finally:
            killed = []
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    if process.environ().get("DDGAN_TEST") == str(tmp_path):
                        process.kill()
                        killed.append(process)
            psutil.wait_procs(killed, timeout=30)


def test_a_killed_sweep_given_again_ends_with_the_table_of_undisturbed_runs(tiny, ray_environment, tmp_path):
    sets = [*tiny, "engine.backend=torch", "scaling.world_size=1", "checkpoint.save_interval_steps=2"]
    folder = tmp_path / "runs"
    words = [word for text in (*sets, f"run.directory={folder}") for word in ("--set", text)]
    command = [sys.executable, "-m", "cluster.sweep", "--config", "digits", *words]
    command += [word for text in VARY for word in ("--vary", text)]
    runs = make_runs("digits", [], [*sets, f"run.directory={folder}"], [varied(text) for text in VARY])

    log = tmp_path / "first.txt"
    with log.open("w") as output:
        sweep = subprocess.Popen(command, cwd=ROOT, env=ray_environment, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 240
        while not list_checkpoints(runs[0].directory / "checkpoints"):
            assert sweep.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        sweep.kill()
        sweep.wait()
    assert "2 runs, 1 at a time" in log.read_text()
    assert not (runs[1].directory / "driver.log").exists()

    again = subprocess.run(command, cwd=ROOT, env=ray_environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert "resuming from" in (runs[0].directory / "driver.log").read_text()
    ended = {run.name: list_checkpoints(run.directory / "checkpoints")[-1].path.stat().st_mtime_ns for run in runs}

    undisturbed = make_runs("digits", [], [*sets, f"run.directory={tmp_path}/alone"], [varied(text) for text in VARY])
    for run in undisturbed:
        train(run.config)
    table = table_of(undisturbed)
    assert table.count("| finished | 160 |") == 2
    assert again.stdout.startswith(table)
    assert (folder / "sweep.md").read_text() == f"{table}\n"
    report = (folder / "report.html").read_text()
    assert all(run.name in report for run in runs)

    third = subprocess.run(command, cwd=ROOT, env=ray_environment, capture_output=True, text=True, timeout=200)
    assert (third.returncode, third.stdout) == (0, again.stdout)
    assert "started" not in third.stderr
    assert ended == {
        run.name: list_checkpoints(run.directory / "checkpoints")[-1].path.stat().st_mtime_ns for run in runs
    }
