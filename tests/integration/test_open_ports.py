"""Every port that a Ray of ours opens, asked by a stranger without the token."""

import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest

from cluster.slurm.ray_node import RayNode
from tests.launch import ROOT, environment

pytestmark = [pytest.mark.ray, pytest.mark.slow]

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
from trainer.ray_adapter import connected
with connected():
    import ray
    print(os.environ["RAY_AUTH_TOKEN"], ray._private.worker._global_node.get_logs_dir_path(), flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True)
class Opened:
    """A Ray that runs.

    Attributes:
        token: of it.
        processes: all of it.
        logs: its folder of logs.
    """

    token: str
    processes: list[psutil.Process]
    logs: Path

    def ports(self) -> list[tuple[str, int, str]]:
        """Address, port and process of everything that listens."""
        found = set()
        for process in self.processes:
            try:
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        found.add((*connection.laddr, process.name()))
            except psutil.Error:
                continue
        return sorted(found)


@pytest.fixture(params=["a job's", "a local run's"])
def opened(request, tmp_path) -> Iterator[Opened]:
    if request.param == "a job's":
        token = tmp_path / "token"
        token.touch(mode=0o600)
        token.write_text("ab12" * 16)
        node = RayNode("127.0.0.1", cpus=1, gpus=0, token=token, temporary=Path("/tmp"))
        with node.head() as head:
            mine = [p for p in psutil.process_iter() if environ(p).get("RAY_AUTH_TOKEN_PATH") == str(token)]
            url = f"127.0.0.1:{head.dashboard_port}"
            wait_for_page(url)
            folder = re.search(r"--temp-dir=(\S+)|--temp_dir=(\S+)", " ".join(w for p in mine for w in p.cmdline()))
            assert folder
            yield Opened(token.read_text(), mine, Path(folder[1] or folder[2]) / "session_latest" / "logs")
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
        yield Opened(token, psutil.Process(process.pid).children(recursive=True), Path(logs))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()


def environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def wait_for_page(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            host, port = url.split(":")
            http.client.HTTPConnection(host, int(port), timeout=5).connect()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.3)


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


def grpc_answer(address: str, port: int) -> grpc.StatusCode:
    """How a call without a token is answered."""
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo", lambda b: b, lambda b: b)
        try:
            call(b"", timeout=10)
        except grpc.RpcError as error:
            return error.code()  # pyright: ignore[reportAttributeAccessIssue]
    return grpc.StatusCode.OK


def test_a_stranger_gets_nothing_from_any_port(opened):
    ports = opened.ports()
    assert len(ports) >= 6
    assert {address for address, *_ in ports} <= {"127.0.0.1", "::1"}, ports
    kinds: dict[str, list[int]] = {"dashboard": [], "agent": [], "metrics": [], "grpc": []}
    for address, port, name in ports:
        answer = ask(address, port, "/metrics")
        if answer and answer[0] == 200 and b"# HELP" in answer[1]:
            kinds["metrics"].append(port)
            assert opened.token.encode() not in answer[1]
        elif ask(address, port, "/api/jobs/") == (401, b"Unauthorized: Missing authentication token"):
            kinds["dashboard"].append(port)
        elif answer and answer[0] == 401:
            kinds["agent"].append(port)
        else:
            assert answer is None or answer[0] >= 400, (address, port, name, answer)
            assert grpc_answer(address, port) == grpc.StatusCode.UNAUTHENTICATED, (address, port, name)
            kinds["grpc"].append(port)
    assert kinds["dashboard"] and kinds["metrics"] and kinds["grpc"], kinds
    for file, open_ports in (("dashboard.log", kinds["dashboard"]), ("dashboard_agent.log", kinds["agent"])):
        for port in open_ports[:1]:
            seen = routes(opened.logs, file)
            assert len(seen) > (40 if file == "dashboard.log" else 3), seen
            for method, path in seen:
                answer = ask("127.0.0.1", port, path, method)
                assert answer
                if not any(
                    path == public or (public != "/" and path.startswith(f"{public}/")) for public in PUBLIC_PATHS
                ):
                    assert answer[0] == 401, (file, method, path, answer)
                assert opened.token.encode() not in answer[1]
    assert not [file for file in opened.logs.rglob("*") if file.is_file() and opened.token in file.read_text("latin1")]
    assert opened.token not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
