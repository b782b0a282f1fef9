"""What the RayJob says, done by hand on this machine: its nodes, its command, and what comes before the head's end."""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
import yaml

from cluster.kubernetes import submit as kubernetes
from cluster.request import make_request
from cluster.slurm.ports import reserve_ports
from tests.launch import ROOT, environment, slow_steps
from trainer.checkpoint.format import list_checkpoints

pytestmark = [pytest.mark.ray, pytest.mark.slow]

POD_IP = "127.0.0.1"
STEPS = 120
SLOW_S = 1.0
"""How long a step waits while the test still needs a running job: the run would take two minutes."""


@dataclass(frozen=True)
class Pods:
    """Head and worker, started with what the manifest says.

    Attributes:
        folder: of the runs.
        manifest: the RayJob.
        overrides: of its config.
        env: of the containers.
        fast: a file that ends the slow steps once it exists.
        dashboard, address: where the dashboard and Ray itself are.
        scratch: folder for the files of nodes.
    """

    folder: Path
    manifest: dict[str, Any]
    overrides: tuple[str, ...]
    env: dict[str, str]
    fast: Path
    dashboard: str
    address: str
    scratch: str

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=300)

    def submit(self, name: str, *more: str) -> subprocess.CompletedProcess[str]:
        """As KubeRay's submitter does."""
        line = ["ray", "job", "submit", "--address", self.dashboard, "--submission-id", name, *more, "--"]
        return self.call(*line, "bash", "-c", self.manifest["spec"]["entrypoint"])


@pytest.fixture(scope="module")
def pods(tiny, tmp_path_factory) -> Iterator[Pods]:
    folder = tmp_path_factory.mktemp("runs")
    fast = folder / "fast"
    sets = (
        *tiny,
        f"run.directory={folder}/run",
        f"training.total_images={16 * STEPS}",
        "checkpoint.save_interval_steps=null",
    )
    arguments = [word for text in sets for word in ("--set", text)]
    request = make_request("digits", arguments, nodes=2, gpus_per_node=None, elsewhere=True)
    text = kubernetes.manifest(request, image="none", claim="none", secret=None)
    manifest = next(iter(yaml.safe_load_all(text)))
    cluster = manifest["spec"]["rayClusterSpec"]
    port, dashboard, *agents = reserve_ports(POD_IP, 4)
    env = environment(
        {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": cluster["authOptions"]["mode"],
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_API_SERVER_ADDRESS": f"http://{POD_IP}:{dashboard}",
            "POD_IP": POD_IP,
            "DDGAN_TEST": str(folder),
            **slow_steps(SLOW_S, unless=fast),
        }
    )
    with tempfile.TemporaryDirectory(prefix="pods", dir="/tmp") as scratch:
        common = {"node-ip-address": POD_IP, "disable-usage-stats": ""}
        head = {"head": "", "port": port, "dashboard-port": dashboard, "temp-dir": f"{scratch}/1"}
        worker = {"address": f"{POD_IP}:{port}", "num-cpus": 2, "temp-dir": f"{scratch}/2"}
        try:
            groups = (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0])
            for own, group, agent in zip((head, worker), groups, agents, strict=True):
                own["dashboard-agent-listen-port"] = agent
                # A pod has all of its ports to itself; here those that it fixes may be taken.
                said = {k: v for k, v in group["rayStartParams"].items() if k != "node-manager-port"}
                options = " ".join(f"--{name}={value}".rstrip("=") for name, value in (common | own | said).items())
                started = subprocess.run(
                    ["bash", "-c", f"ray start {options}"], env=env, capture_output=True, text=True, timeout=120
                )
                assert started.returncode == 0, started.stdout + started.stderr
            yield Pods(folder, manifest, sets, env, fast, f"http://{POD_IP}:{dashboard}", f"{POD_IP}:{port}", scratch)
        finally:
            killed = []
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    if process.environ().get("DDGAN_TEST") == str(folder):
                        process.kill()
                        killed.append(process)
            psutil.wait_procs(killed, timeout=30)  # before their folder goes


def metrics_of(pods: Pods, name: str) -> set[tuple[str, ...]]:
    """Labels (run, node, gpu) of a gauge on the metrics ports of all nodes."""
    found = set()
    (listed,) = Path(pods.scratch, "1").glob("prom_metrics_service_discovery.json")
    for target in (target for group in json.loads(listed.read_text()) for target in group["targets"]):
        with suppress(OSError), urlopen(f"http://{target}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(f"{name}{{"):
                    labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
                    found.add(tuple(labels.get(label, "") for label in ("run", "node", "gpu")))
    return found


def test_a_job_outlives_its_node_shows_its_curves_is_drained_and_the_readmes_command_resumes_it(pods):
    run = pods.folder / "run"
    port = int(pods.dashboard.rpartition(":")[2])
    listening = [tuple(c.laddr) for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert [address for address in listening if port in address] == [(POD_IP, port)]
    first = pods.submit("first", "--no-wait")
    assert first.returncode == 0, first.stdout + first.stderr

    def logs() -> str:
        file = Path(pods.scratch, "1", "session_latest", "logs", "job-driver-first.log")
        return file.read_text() if file.exists() else ""

    def wait_for(what: Callable[[], object], timeout_s: float = 240) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, logs()[-3000:]
            time.sleep(0.5)

    # Its curves are at the metrics port of its node.
    wait_for(lambda: metrics_of(pods, "ray_ddgan_images_per_s") == {("run", "", "")})
    assert metrics_of(pods, "ray_ddgan_node_cpu_percent") == {("run", "0", "")}

    # Its node is taken back, which costs no step.
    nodes = json.loads(pods.call(sys.executable, "-c", NODES, pods.address).stdout.splitlines()[-1])
    (its_node,) = (node["NodeID"] for node in nodes if node["Resources"].get("CPU"))
    worker = ["ray", "start", "--address", pods.address, "--node-ip-address", POD_IP, "--num-cpus", "2"]
    joined = pods.call(*worker, "--temp-dir", f"{pods.scratch}/3", "--disable-usage-stats")
    assert joined.returncode == 0, joined.stdout + joined.stderr
    assert not list_checkpoints(run / "checkpoints")
    drain = ["ray", "drain-node", "--address", pods.address, "--node-id", its_node, "--reason-message", "spot"]
    drained = pods.call(*drain, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds", "300")
    assert drained.returncode == 0, drained.stdout + drained.stderr
    wait_for(lambda: logs().count("training on 2 ranks") == 2 and "resuming from" in logs())
    text = logs()
    assert re.search(r"the nodes of ranks 0, 1 are taken back in \d+ s: saving a checkpoint", text), text
    (saved,) = list_checkpoints(run / "checkpoints")
    assert f"resuming from {saved.path}" in text
    assert "starting the ranks again" not in text  # no failure was counted

    # Kubernetes stops the head.
    head = pods.manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    drained = pods.call(*head["lifecycle"]["preStop"]["exec"]["command"])
    assert drained.returncode == 0, drained.stderr
    told = pods.call("ray", "job", "logs", "--address", pods.dashboard, "first").stdout
    assert "stopped; the same command resumes" in told, told
    status = pods.call("ray", "job", "status", "--address", pods.dashboard, "first")
    said = status.stdout + status.stderr
    assert "' failed" in said and re.search(r"exit code[: ]+75", said), said
    stopped_at = list_checkpoints(run / "checkpoints")[-1].step
    assert saved.step <= stopped_at < STEPS

    # The README's command, from the checkout.
    pods.fast.touch()
    sets = [word for text in pods.overrides for word in ("--set", text)]
    command = ["python", "-m", "trainer.run", "--config", "digits.yaml", *sets]
    second = pods.call("ray", "job", "submit", "--working-dir", ".", "--", *command)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-1000:]
    assert f"resuming from {run}/checkpoints/step-{stopped_at:08d}" in second.stdout
    assert f"checkpoint   {run}/checkpoints/step-{STEPS:08d}" in second.stdout
    assert (run / "samples" / f"step-{STEPS:08d}.png").exists()
    assert (run / "snapshots" / f"step-{STEPS:08d}" / "generator.safetensors").exists()
    assert list_checkpoints(run / "checkpoints")[-1].manifest["world_size"] == 2


NODES = "import json, ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(json.dumps(ray.nodes()))"
