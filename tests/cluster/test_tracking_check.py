"""What preflight says of tracking stores: servers that are down, other servers, wrong passwords, missing rights."""

import base64
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

from cluster.tracking_check import ask_store
from trainer.tracking.store import TrackingError


@pytest.fixture(autouse=True)
def no_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


@pytest.fixture
def server() -> Iterator[str]:
    """Like MLflow behind basic authentication; /broken, /other and /web are other servers."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            user = base64.b64encode(b"user:pa55w0rd").decode()
            codes = {"/broken": 503, "/other": 404, "/web": 200}
            code = next((code for start, code in codes.items() if self.path.startswith(start)), None)
            allowed = self.headers.get("Authorization") in (f"Basic {user}", "Bearer t0ken")
            self.send_response(code or (200 if allowed else 401))
            self.send_header("Content-Type", "text/html" if code else "application/json")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{found.server_port}"
        found.shutdown()


def refusal(uri: str) -> str:
    with pytest.raises(TrackingError) as refused:
        ask_store(uri)
    assert "pa55w0rd" not in str(refused.value) and "\n" not in str(refused.value)
    return str(refused.value)


def test_server_lets_a_user_in_and_tells_others(server, monkeypatch):
    assert ask_store(f"http://user:pa55w0rd@{server}") == f"http://***@{server} answers"
    assert "refuses the user and password that it was given (401)" in refusal(f"http://user:wrong@{server}")
    assert "asks for a user (401): set MLFLOW_TRACKING_USERNAME and" in refusal(f"http://{server}")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    ask_store(f"http://{server}")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pa55w0rd")
    ask_store(f"http://{server}/")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (".mlflow/credentials", "[mlflow]\nmlflow_tracking_username = user\nmlflow_tracking_password = pa55w0rd\n"),
        (".netrc", "machine 127.0.0.1 login user password pa55w0rd\n"),
    ],
)
def test_user_of_a_file_is_let_in(server, tmp_path, file, text):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    (tmp_path / file).chmod(0o600)
    assert "answers" in ask_store(f"http://{server}")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/broken", "answers with an error (503"),
        ("/other", "not as MLflow does (404): check host, port and path"),
        ("/web", "it is another server"),
    ],
)
def test_other_servers_are_told_from_mlflow(server, path, told):
    assert told in refusal(f"http://user:pa55w0rd@{server}{path}")


def test_what_speaks_no_http_is_told():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            with suppress(OSError):
                connection = listener.accept()[0]
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.close()

        threading.Thread(target=greet, daemon=True).start()
        assert "does not answer: SSH-2.0" in refusal(f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_server_that_is_down_is_told():
    told = "does not answer: [Errno 111] Connection refused. Start the server, correct tracking.uri"
    assert told in refusal("http://user:pa55w0rd@127.0.0.1:9")
    assert "does not answer" in refusal("postgresql://user:pa55w0rd@127.0.0.1:9/db")


def test_database_that_can_be_made_passes_and_one_without_rights_does_not(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert ask_store(uri) == uri
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in refusal(uri)
