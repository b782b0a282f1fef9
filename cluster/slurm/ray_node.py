"""One Ray node beside others on the same machine: its own ports and temporary folder, stopped by its own processes."""

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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from data.storage.errors import OperationError

_MARK = "DDGAN_RAY_NODE"
_LONGEST_FOLDER = 40
_STOP_S = 3.0
_START_ATTEMPTS = 3
_OUT_OF_PATIENCE = "timed out during startup"
"""What `ray start` says on a node that is too busy to bring Ray up within its fixed patience."""

log = logging.getLogger(__name__)


class RayStartError(OperationError):
    """`ray start` failed; says what it printed."""


@dataclass(frozen=True)
class Head:
    """Where the head of a cluster is.

    Attributes:
        address: of its node.
        port: of Ray there.
        dashboard_port: of its dashboard there. Ray Train asks it, from whatever node its processes are on, so that it
            listens on the interface of the job and not on the loopback one alone.
    """

    address: str
    port: int
    dashboard_port: int

    @property
    def environment(self) -> dict[str, str]:
        """For Ray's processes and its clients. They would else take the Ray that was last started on their machine."""
        return {"RAY_API_SERVER_ADDRESS": f"http://{self.address}:{self.dashboard_port}"}


@dataclass(frozen=True)
class RayNode:
    """What one node starts Ray with.

    Attributes:
        address: of this node, on the interface of the job.
        cpus, gpus: for ranks.
        token: file that holds the token of the cluster.
        temporary: folder on a local disk.
    """

    address: str
    cpus: int
    gpus: int
    token: Path
    temporary: Path

    @contextmanager
    def head(self) -> Iterator[Head]:
        """Start the first node, and stop it."""
        port, dashboard, client = free_ports(self.address, 3)
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
        """Start one of the others, and stop it."""
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
                    log.warning("%s; once more", error)
                    processes.stop()
            yield processes
        finally:
            processes.stop()
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, options: list[str], environment: dict[str, str]) -> None:
        agent, grpc, runtime, metrics = free_ports(self.address, 4)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={self.address}"]
        command += [f"--num-cpus={self.cpus}", f"--num-gpus={self.gpus}", "--disable-usage-stats"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}"]
        command += [f"--runtime-env-agent-port={runtime}", f"--metrics-export-port={metrics}", *options]
        # Without --block: its processes then belong to nobody's tree, and a signal that Slurm sends to a task and its
        # children leaves them running until the ranks have written their checkpoint.
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
    """The processes of one Ray node: those whose environment carries its mark, and all their children.

    A process that gives itself another title, as Ray's workers do, loses sight of its environment that way.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._raylet: psutil.Process | None = None

    def all(self) -> list[psutil.Process]:
        """Those that live."""
        found: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark:
                    found |= {process, *process.children(recursive=True)}
        return [process for process in found if _lives(process)]

    def alive(self) -> bool:
        """Whether the node still is one: its raylet lives."""
        if self._raylet is None:
            self._raylet = next((process for process in self.all() if process.name() == "raylet"), None)
        return self._raylet is not None and _lives(self._raylet)

    def stop(self) -> None:
        """SIGTERM, and soon SIGKILL for those that stay: what counts lies in checkpoints, not here."""
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
    """What Ray's processes and its clients find in their environment."""
    interface = interface_of(address)
    autoscaler, dashboard = free_ports(address, 2)
    found = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Fixed ports otherwise: the second job of a node would not get them.
        "AUTOSCALER_METRIC_PORT": str(autoscaler),
        "DASHBOARD_METRIC_PORT": str(dashboard),
    }
    if interface:
        found |= {name: os.environ.get(name, interface) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return found


def own_address(interface: str, towards: str | None) -> str:
    """The IPv4 address of this node.

    Args:
        interface: its name; empty: the one that leads to `towards`, or else the default route's.
        towards: address of another node.

    Raises:
        RayStartError: there is no such interface, or it has no address.
    """
    if interface:
        addresses = psutil.net_if_addrs()
        found = [a.address for a in addresses.get(interface, []) if a.family == socket.AF_INET]
        if not found:
            raise RayStartError(
                f"DDGAN_INTERFACE is {interface}: no such interface with an IPv4 address on {socket.gethostname()}; it "
                f"has {', '.join(addresses)}"
            )
        return found[0]
    # Nothing is sent: it only chooses a route. Without one, what the name of the host stands for must do.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((towards or "192.0.2.1", 9))
        return probe.getsockname()[0]
    return socket.gethostbyname(socket.gethostname())


def interface_of(address: str) -> str | None:
    """The name of the interface that has an address; None if none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return name
    return None


def free_ports(address: str, number: int) -> list[int]:
    """Ports that nothing listens on now; they are taken soon, so that hardly anybody comes in between."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((address, 0))) for _ in range(number)]
        return [s.getsockname()[1] for s in sockets]


def answers(head: Head, timeout_s: float = 5.0) -> bool | None:
    """Whether a Ray listens at the head; None: no answer at all, as when the network is cut."""
    try:
        socket.create_connection((head.address, head.port), timeout=timeout_s).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return None
    return True


def _short(folder: Path) -> Path:
    return folder if len(str(folder)) <= _LONGEST_FOLDER else Path("/tmp")
