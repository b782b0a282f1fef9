"""A real Ray cluster of two hosts with a network between them: a job trains across both, whatever the link does."""

import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.launch import ROOT, environment
from tests.network import INTERFACE, Host, Network, two_hosts
from trainer.checkpoint.format import list_checkpoints

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RAY = str(Path(sys.executable).with_name("ray"))
PORT, DASHBOARD_PORT = 6379, 8265
# Ray's own patience with a node that is silent, 45 s, is cut short.
PATIENCE = {"period_ms": "1000", "timeout_ms": "2000", "failure_threshold": "4"}
RUN = (
    "checkpoint.save_interval_steps=10",
    "scaling.timeout_s=20",
    "scaling.max_failures=10",
)


@dataclass
class Cluster:
    """Ray on both hosts, as docs/ray.md starts it by hand."""

    network: Network
    folder: Path
    scratch: Path
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    @property
    def env(self) -> dict[str, str]:
        file = self.folder / "token"
        if not file.exists():
            file.touch(mode=0o600)
            file.write_text(self.token)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file), "PATH": path}
        settings["DDGAN_LAUNCHES"] = str(self.folder / "launches")
        settings |= {f"RAY_health_check_{name}": value for name, value in PATIENCE.items()}
        settings["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "30"
        # Ray takes the one that was last started on this machine otherwise; two hosts share its /tmp here.
        address = f"http://{self.network.hosts[0].address}:{DASHBOARD_PORT}"
        return environment(settings | {"GLOO_SOCKET_IFNAME": INTERFACE, "RAY_API_SERVER_ADDRESS": address})

    def start(self, host: Host) -> None:
        head = self.network.hosts[0]
        where = ["--head", f"--port={PORT}", f"--dashboard-host={head.address}", f"--dashboard-port={DASHBOARD_PORT}"]
        if host != head:
            where = [f"--address={head.address}:{PORT}"]
        words = ["start", f"--node-ip-address={host.address}", "--num-cpus=1", "--disable-usage-stats", *where]
        words.append(f"--temp-dir={self.scratch / host.name[-1]}")
        done = subprocess.run(host.command(RAY, *words), env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    @contextmanager
    def job(self, name: str, *sets: str) -> Iterator["Job"]:
        """A submitted job, which does not outlive its test."""
        job = self.submit(name, *sets)
        try:
            yield job
        finally:
            job.end()

    def submit(self, name: str, *sets: str) -> "Job":
        words = [word for text in (*sets, f"run.directory={self.folder / name}") for word in ("--set", text)]
        address = f"http://{self.network.hosts[0].address}:{DASHBOARD_PORT}"
        line = [sys.executable, "-m", "cluster.launch", "ray", "--address", address, "--config", "digits", "--", *words]
        done = self.call(*line)
        assert done.returncode == 0, done.stdout + done.stderr
        number = re.search(r"submitted as job (\S+);", done.stderr)
        assert number
        return Job(self, name, number[1])

    def call(self, *line: str) -> subprocess.CompletedProcess[str]:
        """A command on the first host, in the checkout."""
        command = self.network.hosts[0].command(*line)
        return subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=120)


@dataclass
class Job:
    cluster: Cluster
    name: str
    number: str

    def ours(self, command: str) -> str:
        """What `launch.sh COMMAND RUN` prints."""
        directory = str(self.cluster.folder / self.name)
        done = self.cluster.call(sys.executable, "-m", "cluster.launch", command, directory)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def log(self) -> str:
        # Not through the link session_latest, which Ray renews while it runs.
        (file,) = self.cluster.scratch.glob(f"1/session_2*/logs/job-driver-{self.number}.log")
        return file.read_text()

    def step(self) -> int:
        found = list_checkpoints(self.cluster.folder / self.name / "checkpoints")
        return found[-1].step if found else 0

    def wait(self, words: str, timeout_s: float = 180) -> None:
        """Until the driver has printed something that matches."""
        deadline = time.monotonic() + timeout_s
        while not re.search(words, self.log):
            assert time.monotonic() < deadline and "Traceback (most recent call last)\n  File" not in self.log, self.log
            time.sleep(0.3)

    def wait_for_status(self, words: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while words not in (said := self.ours("status")):
            assert time.monotonic() < deadline, said
            time.sleep(0.5)

    def wait_for_step(self, step: int, timeout_s: float = 180) -> None:
        deadline = time.monotonic() + timeout_s
        while self.step() < step:
            assert time.monotonic() < deadline, self.log
            time.sleep(0.3)

    def group_sizes(self) -> list[int]:
        """The sizes of the groups that trained, in order."""
        # Ray repeats the output of a host that comes back, word for word.
        lines = dict.fromkeys(self.log.splitlines())
        return [int(size) for line in lines for size in re.findall(r"training on (\d)", line)]

    def end(self) -> None:
        """End it if it still runs, so that the next job finds room."""
        address = f"http://{self.cluster.network.hosts[0].address}:{DASHBOARD_PORT}"
        self.cluster.call(RAY, "job", "stop", "--address", address, self.number)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    # Of a short path: the system allows 107 characters for a socket.
    with two_hosts() as network, tempfile.TemporaryDirectory(prefix="hosts", dir="/tmp") as scratch:
        found = Cluster(network, tmp_path_factory.mktemp("hosts"), Path(scratch))
        for host in network.hosts:
            found.start(host)
        yield found
        for host in network.hosts:
            host.end_processes()


def test_a_run_continues_with_what_is_left_when_a_link_is_cut_takes_the_host_back_and_saves_when_it_is_stopped(
    cluster, tiny
):
    endless = "training.total_images=1000000"
    more = ("scaling.min_world_size=1", "engine.zero_stage_g=1", "tracking.backends=[mlflow]")
    with cluster.job("elastic", *tiny, *RUN, endless, *more) as job:
        job.wait_for_step(10)
        assert job.group_sizes() == [2]
        assert "all-reduce      ok      1 pairs over gloo" in job.log
        assert cluster.network.link.carried > 100
        assert "RUNNING" in job.ours("status")

        cluster.network.link.is_cut = True
        cut_at = job.step()
        job.wait("training on 1")
        job.wait_for_step(cut_at + 20)
        cluster.network.link.is_cut = False
        second = cluster.network.hosts[1]
        second.end_processes()  # as a host that comes back: what of Ray was there is gone
        cluster.start(second)
        job.wait("there is room for 2 ranks: saving a checkpoint and continuing with them")
        job.wait("from 1 ranks, .*, to 2 ranks")
        job.wait_for_step(job.step() + 20)
        assert job.group_sizes() == [2, 1, 2]

        lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        sent_at = time.time()
        job.ours("stop")
        job.wait_for_status("was stopped")
        newest = list_checkpoints(cluster.folder / "elastic" / "checkpoints")[-1]
        assert (newest.path / "manifest.json").stat().st_mtime - sent_at < 30  # the grace that clusters give
        assert newest.manifest["world_size"] == 2
        assert newest.manifest["images"] == 16 * newest.step  # the global batch stayed
        assert "stopped; the same command resumes" in job.ours("logs")
        assert f"asked to stop: step {job.step()} is done" in job.log
        check_that_the_token_is_nowhere(cluster, job, lines)
        check_what_travelled(cluster)


def check_that_the_token_is_nowhere(cluster: Cluster, job: Job, lines: str) -> None:
    """Neither in these lines of processes, nor in what Ray says of its jobs, nor in any file but its own."""
    assert cluster.token not in lines
    address = f"http://{cluster.network.hosts[0].address}:{DASHBOARD_PORT}"
    listed = cluster.call(RAY, "job", "list", "--address", address)
    assert job.number in listed.stdout and cluster.token not in listed.stdout
    folders = (cluster.folder, cluster.scratch)
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    assert any(file.name == "mlflow.db" for file in files)
    assert [file for file in files if cluster.token.encode() in file.read_bytes()] == [cluster.folder / "token"]


def check_what_travelled(cluster: Cluster) -> None:
    """The code, and nothing that is large or private."""
    (code,) = cluster.scratch.glob("1/session_latest/runtime_resources/working_dir_files/_ray_pkg_*/launch.sh")
    travelled = {path.name for path in code.parent.iterdir()}
    assert {"trainer", "cluster", "models", "data"} <= travelled
    assert not travelled & {".git", ".venv", "runs", "datasets", "tests", "docs", "shared"}


def test_a_run_over_a_bad_link_waits_for_the_other_host_when_it_is_cut(cluster, tiny):
    link = cluster.network.link
    link.delay_s, link.loss, link.lost = 0.020, 0.01, 0
    with cluster.job("waiting", *tiny, *RUN, "training.total_images=480") as job:
        job.wait_for_step(10)
        assert link.lost > 0

        link.is_cut = True
        cut_at = job.step()
        job.wait("and address: .* has been marked dead", timeout_s=120)
        second = cluster.network.hosts[1]
        second.end_processes()
        time.sleep(5)
        assert job.step() <= cut_at + 10 < 30
        assert job.group_sizes() == [2]
        link.is_cut = False
        cluster.start(second)
        job.wait("finished: step 30")
        assert set(job.group_sizes()) == {2}
