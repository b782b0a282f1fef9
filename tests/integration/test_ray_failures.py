"""What a cluster does to a run: its driver killed, a whole node lost and brought back, a start that never gets far."""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.integration.test_ray import free_port
from tests.launch import ROOT, environment, run_ranks, running, train_command, wait_for_checkpoint
from trainer.checkpoint import list_checkpoints, newest_valid
from trainer.fingerprint import fingerprint
from trainer.run import STOPPED

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def holder_of(directory: Path) -> int | None:
    """Process of rank 0, as the lease on a run names it."""
    try:
        return json.loads((directory / "lease.json").read_text())["pid"]
    except (OSError, ValueError):
        return None


def test_killed_driver_and_then_a_killed_worker_change_no_bit(tiny, tmp_path):
    directory, log, straight = tmp_path / "run", tmp_path / "log.txt", tmp_path / "straight"
    more = ("training.total_images=3200", "checkpoint.save_interval_steps=20", "scaling.world_size=2")
    arguments = train_command("digits", tiny, directory, *more)
    with running(arguments, log) as process:
        wait_for_checkpoint(directory, process, log)
        process.kill()  # it alone: nobody tells the workers, or the Ray that it started
        process.wait()
    assert newest_valid(directory / "checkpoints")

    again = tmp_path / "again.txt"
    with running(arguments, again) as process:
        deadline = time.monotonic() + 180
        begun = newest_valid(directory / "checkpoints")
        assert begun
        while list_checkpoints(directory / "checkpoints")[-1].step <= begun.step:
            assert process.poll() is None and time.monotonic() < deadline, again.read_text()[-3000:]
            time.sleep(0.1)
        worker = holder_of(directory)
        assert worker
        os.kill(worker, signal.SIGKILL)
        assert process.wait(timeout=240) == 0, again.read_text()[-3000:]
    assert again.read_text().count("resuming from") == 2

    sets = [*tiny, *more, f"run.directory={straight}"]
    done = run_ranks(2, ["-m", "trainer.worker", "--config", "digits", *(x for o in sets for x in ("--set", o))])
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [list_checkpoints(folder / "checkpoints")[-1] for folder in (directory, straight)]
    assert [end.step for end in ends] == [200, 200]
    assert fingerprint(ends[0]) == fingerprint(ends[1])


def test_start_that_fails_three_times_at_one_place_ends_the_run(tiny, tmp_path):
    directory, log = tmp_path / "run", tmp_path / "log.txt"
    arguments = train_command("digits", tiny, directory, "scaling.world_size=1", "scaling.max_failures=10")
    with running(arguments, log) as process:
        killed: set[int] = set()
        deadline = time.monotonic() + 240
        while process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            worker = holder_of(directory)
            if worker and worker != process.pid and worker not in killed:  # the driver looks at the lease as well
                killed.add(worker)
                os.kill(worker, signal.SIGKILL)
            time.sleep(0.02)
    text = log.read_text()
    assert process.returncode == 1, text[-3000:]
    assert len(killed) == 3
    assert "the workers failed 3 times before the first step of a start" in text
    assert "going on in 2 s" in text  # before the third start
    assert text.splitlines()[-1] == "To go on from the last checkpoint, give the same command again."


class Cluster:
    """A head without CPUs, and nodes with one each, all on this machine."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        bin_folder = str(Path(sys.executable).parent)
        settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        self._env = environment(settings | {"PATH": f"{bin_folder}:{os.environ['PATH']}"})
        self._ray = f"{bin_folder}/ray"
        self.nodes: dict[str, subprocess.Popen] = {}
        dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={free_port()}"]
        self._start("head", "--head", f"--port={self._port}", "--num-cpus=0", *dashboard)
        self.client = self._env | {"RAY_ADDRESS": f"127.0.0.1:{self._port}"}

    def add(self, name: str) -> None:
        """Start a node."""
        self._start(name, f"--address=127.0.0.1:{self._port}", "--num-cpus=1")

    def kill(self, name: str) -> None:
        """End a node as a power cut does: all of its processes at once."""
        process = self.nodes.pop(name)
        whole = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in whole:
            each.kill()
        process.wait()

    def _start(self, name: str, *arguments: str) -> None:
        line = [self._ray, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", *arguments]
        log = self._folder / f"{name}.txt"
        with log.open("w") as output:
            self.nodes[name] = subprocess.Popen(line, env=self._env, stdout=output, stderr=output, cwd=self._folder)
        deadline = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert self.nodes[name].poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        for name in reversed(list(made.nodes)):
            made.kill(name)


@contextmanager
def training(cluster: Cluster, arguments: list[str], log: Path) -> Iterator[subprocess.Popen]:
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=cluster.client, stdout=output, stderr=output
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for_words(pattern: str, log: Path, process: subprocess.Popen, times: int = 1) -> None:
    deadline = time.monotonic() + 180
    while len(re.findall(pattern, log.read_text())) < times:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)


def test_elastic_run_goes_on_without_a_lost_node_and_takes_it_back(tiny, tmp_path, cluster):
    cluster.add("first")
    cluster.add("second")
    directory, log = tmp_path / "run", tmp_path / "log.txt"
    more = ("training.total_images=200_000", "checkpoint.save_interval_steps=20", "scaling.world_size=2")
    arguments = train_command("digits", tiny, directory, *more, "scaling.min_world_size=1", "engine.zero_stage_g=1")
    with training(cluster, arguments, log) as process:
        wait_for_checkpoint(directory, process, log)
        cluster.kill("second")
        wait_for_words("converted from 2 ranks", log, process)
        cluster.add("third")
        wait_for_words("there is room for 2 ranks", log, process)
        wait_for_words("converted from 1 ranks", log, process)
        sent_at = time.time()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == STOPPED, log.read_text()[-3000:]
    assert "stopped; the same command resumes" in log.read_text()
    newest = list_checkpoints(directory / "checkpoints")[-1]
    assert (newest.path / "manifest.json").stat().st_mtime - sent_at < 30  # the grace that clusters give
    assert newest.manifest["world_size"] == 2
    assert newest.manifest["images"] == 16 * newest.step  # the global batch stayed
