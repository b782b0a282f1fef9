"""One Ray node that can share a machine with others.

It has its own ports and temporary folder, and stopping it ends only its own processes.
"""

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.slurm.ports import reserve_ports
from data.storage.errors import OperationError

_MARK = "DDGAN_RAY_NODE"
_LONGEST_FOLDER = 40
_STOP_S = 3.0
_START_ATTEMPTS = 3
_OUT_OF_PATIENCE = "timed out during startup"
"""What `ray start` prints on a node that is too busy to start Ray within its fixed timeout."""

log = logging.getLogger(__name__)


class RayStartError(OperationError):
    """`ray start` failed; the message quotes its output."""


@dataclass(frozen=True)
class Head:
    """Where the head of a cluster is.

    Attributes:
        address: address of its node.
        port: Ray's port on it.
        dashboard_port: the dashboard's port on it. Ray Train's processes on any node use the dashboard, so it listens
            on the job's interface, not only on loopback.
    """

    address: str
    port: int
    dashboard_port: int

    @property
    def environment(self) -> dict[str, str]:
        """Environment of Ray's processes and clients. Without it they use the Ray last started on their machine."""
        return {"RAY_API_SERVER_ADDRESS": f"http://{self.address}:{self.dashboard_port}"}


@dataclass(frozen=True)
class RayNode:
    """The settings with which one node starts Ray.

    Attributes:
        address: address of this node on the job's interface.
        cpus, gpus: CPUs and GPUs for ranks.
        token: file with the cluster's token.
        temporary: folder on a local disk.
    """

    address: str
    cpus: int
    gpus: int
    token: Path
    temporary: Path

    @contextmanager
    def head(self) -> Iterator[Head]:
        """Inside, the head node runs; it is stopped at the end."""
        port, dashboard, client = reserve_ports(self.address, 3)
        options = [
            "--head",
            f"--port={port}",
            "--include-dashboard=true",
            f"--dashboard-host={self.address}",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
        ]
        head = Head(self.address, port, dashboard)
        with self._started(options, head):
            yield head

    @contextmanager
    def member(self, head: Head) -> Iterator["Processes"]:
        """Inside, a node that joins `head` runs; it is stopped at the end."""
        with self._started([f"--address={head.address}:{head.port}"], head) as processes:
            yield processes

    @contextmanager
    def _started(self, options: list[str], head: Head) -> Iterator["Processes"]:
        mark = uuid.uuid4().hex
        folder = Path(tempfile.mkdtemp(prefix=f"ddgan-{mark[:6]}-", dir=_short(self.temporary)))  # mode 700
        processes = Processes(mark)
        try:
            for attempt in range(1, _START_ATTEMPTS + 1):
                try:
                    self._start([*options, f"--temp-dir={folder}"], head.environment | {_MARK: mark})
                    break
                except RayStartError as error:
                    if attempt == _START_ATTEMPTS or _OUT_OF_PATIENCE not in str(error):
                        raise
                    log.warning("%s; trying again", error)
                    processes.stop()
            yield processes
        finally:
            processes.stop()
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, options: list[str], environment: dict[str, str]) -> None:
        agent, grpc, runtime, metrics = reserve_ports(self.address, 4)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={self.address}"]
        command += [f"--num-cpus={self.cpus}", f"--num-gpus={self.gpus}", "--disable-usage-stats"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
        command += [f"--runtime-env-agent-port={runtime}", f"--metrics-export-port={metrics}", *options]
        # Without --block, Ray's processes are not children of this task. Slurm's signal to a task and its children then
        # does not reach them, and they run until the ranks have written their checkpoint.
        done = subprocess.run(
            command,
            env=os.environ | ray_environment(self.token, self.address) | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if done.returncode:
            last = (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
            raise RayStartError(f"ray start on {socket.gethostname()} ended with {done.returncode}: {last}")


class Processes:
    """The processes of one Ray node: those with its mark in their environment, and all their children.

    The children are needed because a process that changes its title, as Ray's workers do, overwrites its environment.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._raylet: psutil.Process | None = None

    def all(self) -> list[psutil.Process]:
        """All live processes of the node."""
        found: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark:
                    found |= {process, *process.children(recursive=True)}
        return [process for process in found if _lives(process)]

    def alive(self) -> bool:
        """Whether the node still works: its raylet is alive."""
        if self._raylet is None:
            self._raylet = next((process for process in self.all() if process.name() == "raylet"), None)
        return self._raylet is not None and _lives(self._raylet)

    def stop(self) -> None:
        """Send SIGTERM, then SIGKILL after a short wait. Nothing is lost: what matters is in checkpoints."""
        processes = self.all()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        left = {*psutil.wait_procs(processes, timeout=_STOP_S)[1], *self.all()}
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=_STOP_S)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def ray_environment(token: Path, address: str) -> dict[str, str]:
    """Environment variables of Ray's processes and clients."""
    interface = interface_of(address)
    autoscaler, dashboard = reserve_ports(address, 2)
    found = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # These ports are fixed by default, and a second job on the same node could not bind them.
        "AUTOSCALER_METRIC_PORT": str(autoscaler),
        "DASHBOARD_METRIC_PORT": str(dashboard),
    }
    if interface:
        found |= {name: os.environ.get(name, interface) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return found


def own_address(interface: str, towards: str | None) -> str:
    """The IPv4 address of this node.

    Args:
        interface: name of the interface; empty: the interface of the route to `towards`, or of the default route.
        towards: address of another node, or None.

    Raises:
        RayStartError: there is no such interface, or it has no address.
    """
    if interface:
        addresses = psutil.net_if_addrs()
        found = [a.address for a in addresses.get(interface, []) if a.family == socket.AF_INET]
        if not found:
            raise RayStartError(
                f"DDGAN_INTERFACE is {interface}, but {socket.gethostname()} has no such interface with an IPv4 "
                f"address: choose from {', '.join(addresses)}"
            )
        return found[0]
    # Connecting a UDP socket sends nothing, it only selects a route. Without a route, use the host name's address.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((towards or "192.0.2.1", 9))
        return probe.getsockname()[0]
    return socket.gethostbyname(socket.gethostname())


def interface_of(address: str) -> str | None:
    """The name of the interface with this address, or None."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return name
    return None


def answers(head: Head, timeout_s: float = 5.0) -> bool | None:
    """Whether Ray listens at the head; None: no answer at all, as when the network is down."""
    try:
        socket.create_connection((head.address, head.port), timeout=timeout_s).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return None
    return True


def _short(folder: Path) -> Path:
    return folder if len(str(folder)) <= _LONGEST_FOLDER else Path("/tmp")
