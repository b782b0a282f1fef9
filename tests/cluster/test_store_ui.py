"""Who can see a store of runs, and what they can do to the files of its owner."""

import base64
import http.client
import json
import os
import re
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Thread
from typing import Any

import pytest

from cluster.store_ui import USER, StoreProxy, mlflow_behind, outside_place
from data.storage.errors import UserError
from tests.launch import ROOT, environment

PASSWORD = "right"


@pytest.mark.parametrize(
    "request_body",
    [
        {"name": "x", "artifact_location": "file:///home/me"},
        {"name": "x", "artifactLocation": "/home/me"},
        {"name": "x", "artifact_location": "mlflow-artifacts:/../x"},
        {"name": "x", "artifact_location": "mlflow-artifacts:/%2e%2e/x"},
        {"name": "x", "artifact_location": "s3://bucket/x"},
        {"name": "m", "source": "/home/me"},
        {"tags": [{"key": "mlflow.artifactLocation", "value": "/home/me"}]},
        {"trace": {"tags": {"mlflow.artifactLocation": "/home/me"}}},
        json.dumps({"artifact_location": "/home/me"}),
    ],
    ids=str,
)
def test_an_artifact_location_outside_the_store_is_found(request_body: Any) -> None:
    assert outside_place(request_body)


@pytest.mark.parametrize(
    "request_body",
    [
        {"experiment_ids": ["0"], "filter": "attributes.artifact_uri = 'x'"},
        {"name": "x", "artifact_location": ""},
        {"name": "x", "artifact_location": "mlflow-artifacts:/1/artifacts"},
        {"name": "m", "source": "runs:/abc/model"},
        {"key": "mlflow.note.content", "value": "{not json"},
        [],
        None,
    ],
    ids=str,
)
def test_other_requests_pass(request_body: Any) -> None:
    assert outside_place(request_body) is None


def test_a_taken_port_is_told_with_a_free_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is taken; (\d+) is free: ./launch.sh ui --port \1") as told:
            StoreProxy(port, PASSWORD)
    free = int(str(told.value).split()[-1])
    assert free != port
    StoreProxy(free, PASSWORD).server_close()


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self, path: str, body: Any = None, password: str | None = PASSWORD, method: str = "", **headers: str
    ) -> tuple[int, bytes]:
        """Status and content of an answer; the body is sent as JSON."""
        if password is not None:
            token = base64.b64encode(f"{USER}:{password}".encode()).decode()
            headers = {"Authorization": f"Basic {token}"} | headers
        content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, content, {"Content-Type": "application/json"} | headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Path, Path]]:
    """A client of a real MLflow behind the proxy, the folder of the store, and the private socket."""
    folder = tmp_path_factory.mktemp("store")
    with (
        StoreProxy(0, PASSWORD) as proxy,
        mlflow_behind(folder / "mlflow.db", folder / "mlartifacts") as (place, _),
    ):
        proxy.behind = place
        Thread(target=proxy.serve_forever, daemon=True).start()
        yield Client(proxy.server_port), folder, place
        proxy.shutdown()


API = "/api/2.0/mlflow"


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/", "/health", f"{API}/experiments/search?max_results=1", "/get-artifact"])
@pytest.mark.parametrize("password", [None, "", "wrong"])
def test_nothing_is_served_without_the_password(
    served: tuple[Client, Path, Path], path: str, password: str | None
) -> None:
    assert served[0].ask(path, password=password)[0] == 401


@pytest.mark.slow
def test_the_owner_sees_the_pages_and_can_store_artifacts(served: tuple[Client, Path, Path]) -> None:
    client, folder, _ = served
    status, page = client.ask("/")
    assert status == 200 and b"<html" in page.lower()
    experiment = json.loads(client.ask(f"{API}/experiments/create", {"name": "mine"})[1])["experiment_id"]
    run = json.loads(client.ask(f"{API}/runs/create", {"experiment_id": experiment})[1])["run"]["info"]["run_id"]
    stored = client.ask(f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={run}&path=note.txt", b"hello")
    assert stored[0] == 200
    assert client.ask(f"/get-artifact?run_uuid={run}&path=note.txt") == (200, b"hello")
    assert [file.read_bytes() for file in (folder / "mlartifacts").rglob("note.txt")] == [b"hello"]


@pytest.mark.slow
def test_artifact_locations_outside_the_store_are_refused(served: tuple[Client, Path, Path], tmp_path: Path) -> None:
    status, words = served[0].ask(f"{API}/experiments/create", {"name": "x", "artifact_location": tmp_path.as_uri()})
    assert status == 403 and b"outside of the store" in words


@pytest.mark.slow
@pytest.mark.parametrize(
    "headers", [{"Origin": "http://127.0.0.1:1"}, {"Origin": "null"}, {"Host": "evil.example"}], ids=str
)
def test_pages_of_other_origins_are_refused(served: tuple[Client, Path, Path], headers: dict[str, str]) -> None:
    assert served[0].ask(f"{API}/experiments/create", {"name": "foreign"}, **headers)[0] == 403


@pytest.mark.slow
def test_the_socket_behind_is_in_a_private_folder(served: tuple[Client, Path, Path]) -> None:
    place = served[2]
    assert stat.S_ISSOCK(place.stat().st_mode) and place.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
def test_the_command_prints_a_password_and_leaves_nothing_behind(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from cluster.store_ui import serve; serve(Path(sys.argv[1]), 0)"
    command = [sys.executable, "-c", program, str(tmp_path / "mlflow.db")]
    env = environment({"TMPDIR": str(tmp_path)})
    process = Popen(command, cwd=ROOT, env=env, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True)
    try:
        assert process.stderr
        told = ""
        while "password" not in told:
            line = process.stderr.readline()
            assert line, told
            told += line
        port, password = re.findall(rf"http://127.0.0.1:(\d+) [^\0]*user {USER}, password (\S+)", told)[0]
        assert Client(int(port)).ask("/health", password=password) == (200, b"OK")
        with socket.socket() as probe:  # another address of this machine
            assert probe.connect_ex(("127.0.0.2", int(port))) != 0
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert not list(tmp_path.glob("ddgan-ui-*"))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
