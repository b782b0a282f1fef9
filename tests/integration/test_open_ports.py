"""Every port that a Ray of ours opens, asked by a stranger without the token."""

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
import ray

from cluster.slurm.ray_node import RayNode
from tests.launch import ROOT, environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LOGS = ("dashboard.log", "dashboard_agent.log")
PUBLIC_PATHS = {
    # Ray needs these before a browser has a token; docs/security.md lists them.
    "/": "the page itself",
    "/favicon.ico": "its picture",
    "/static": "its scripts",
    "/api/authentication_mode": "says that a token is asked for",
    "/api/authenticate": "takes the token",
    "/api/healthz": "alive or not",
    "/api/gcs_healthz": "alive or not",
    "/api/local_raylet_healthz": "alive or not",
    "/-/healthz": "alive or not",
}
LOCAL = """
from trainer.run import set_up_ray
set_up_ray()
import os, sys, time
from trainer.driver.connection import connected
with connected(shared=True):
    import ray
    print(os.environ["RAY_AUTH_TOKEN"], ray._private.worker._global_node.get_logs_dir_path(), flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Opened:
    """A Ray that runs.

    Attributes:
        token: of it.
        processes: gives all of it.
        logs: its folder of logs.
    """

    token: str
    processes: Callable[[], list[psutil.Process]]
    logs: Path

    def ports(self) -> list[tuple[str, int, str]]:
        """Address, port and process of everything that listens."""
        found = set()
        for process in self.processes():
            try:
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        found.add((*connection.laddr, process.name()))
            except psutil.Error:
                continue
        return sorted(found)


@pytest.fixture(params=["a job's", "a local sweep's"])
def opened(request, tmp_path) -> Iterator[Opened]:
    """A local run's Ray has the same processes, less the dashboard's."""
    if request.param == "a job's":
        token = tmp_path / "token"
        token.touch(mode=0o600)
        token.write_text("ab12" * 16)
        node = RayNode("127.0.0.1", cpus=1, gpus=0, token=token, temporary=Path("/tmp"))
        with node.head() as head:

            def mine() -> list[psutil.Process]:
                marked = [p for p in psutil.process_iter() if environ(p).get("RAY_AUTH_TOKEN_PATH") == str(token)]
                return [*{*marked, *(child for p in marked for child in p.children(recursive=True))}]

            words = " ".join(word for process in mine() for word in process.cmdline())
            folder = re.search(r"--temp[-_]dir=(\S+)", words)
            assert folder and head.dashboard_port
            yield Opened(token.read_text(), mine, Path(folder[1]) / "session_latest" / "logs")
        return
    process = subprocess.Popen(
        [sys.executable, "-c", LOCAL],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout
        token, logs = process.stdout.readline().split()
        yield Opened(token, lambda: psutil.Process(process.pid).children(recursive=True), Path(logs))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()


def environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def wait_until_all_listen(opened: Opened) -> list[tuple[str, int, str]]:
    """What listens, once the last of Ray's servers does: the page, and both agents of the node."""
    deadline = time.monotonic() + 240
    while True:
        ports = opened.ports()
        names = [name for *_, name in ports]
        routed = all((opened.logs / file).exists() and routes(opened.logs, file) for file in LOGS)
        if routed and {"ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= {*names}:
            return ports
        assert time.monotonic() < deadline, ports
        time.sleep(0.5)


def ask(address: str, port: int, path: str, method: str = "GET") -> tuple[int, bytes] | None:
    """Status and body; None if it does not speak HTTP."""
    connection = http.client.HTTPConnection(address, port, timeout=15)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def routes(logs: Path, file: str) -> list[tuple[str, str]]:
    """Method and path of each route that Ray wrote into its log at its start, with something in place of parameters."""
    found = re.findall(r"<(?:\w*Route) \[(\w+)\] <\w+ +(/[^ >]*)", (logs / file).read_text())
    return sorted({(method, re.sub(r"\{[^}]*\}", "x", path)) for method, path in found})


def grpc_methods() -> list[str]:
    """Every method of Ray's gRPC services. The object manager's are in its C++ alone."""
    folder = Path(ray.__file__).parent / "core" / "generated"
    sources = "".join(file.read_text() for file in folder.glob("*_pb2_grpc.py"))
    found = {*re.findall(r"'(/ray\.rpc[.\w]*/\w+)'", sources)}
    return sorted(found | {"/ray.rpc.ObjectManagerService/Pull", "/ray.rpc.ObjectManagerService/Push"})


def grpc_answers(address: str, port: int) -> dict[str, str]:
    """How calls without a token are answered, of those that the port knows."""
    answers = {}
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        for method in grpc_methods():
            call = channel.unary_unary(method, bytes, bytes)
            try:
                call(b"", timeout=10)
                answers[method] = "OK"
            except grpc.RpcError as error:
                answers[method] = error.code().name  # pyright: ignore[reportAttributeAccessIssue]
    return {method: answer for method, answer in answers.items() if answer != "UNIMPLEMENTED"}


def test_a_stranger_gets_nothing_from_any_port(opened):
    ports = wait_until_all_listen(opened)
    kinds: dict[str, list[tuple[str, int]]] = {"dashboard": [], "agent": [], "metrics": [], "grpc": []}
    for address, port, name in ports:
        # What listens on all addresses is asked at one; a v4 address that is written as v6 is a v4 address.
        host = "127.0.0.1" if address in ("0.0.0.0", "::") else address.removeprefix("::ffff:")
        answer = ask(host, port, "/metrics")
        if answer and answer[0] == 200 and b"# HELP" in answer[1]:
            kinds["metrics"].append((host, port))
            assert opened.token.encode() not in answer[1]
        elif answer:
            assert answer == (401, b"Unauthorized: Missing authentication token"), (address, port, name)
            kinds["dashboard" if "dashboard.py" in name or "python" in name else "agent"].append((host, port))
        else:
            answers = grpc_answers(host, port)
            assert answers and set(answers.values()) == {"UNAUTHENTICATED"}, (address, port, name, answers)
            kinds["grpc"].append((host, port))
    assert all(kinds.values()), kinds
    for file, open_ports in zip(LOGS, (kinds["dashboard"], kinds["agent"]), strict=True):
        for host, port in open_ports[:1]:
            seen = routes(opened.logs, file)
            assert len(seen) > (40 if file == "dashboard.log" else 3), seen
            for method, path in seen:
                answer = ask(host, port, path, method)
                assert answer
                if not any(
                    path == public or (public != "/" and path.startswith(f"{public}/")) for public in PUBLIC_PATHS
                ):
                    assert answer[0] == 401, (file, method, path, answer)
                assert opened.token.encode() not in answer[1]
    assert not [file for file in opened.logs.rglob("*") if file.is_file() and opened.token in file.read_text("latin1")]
    assert opened.token not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
