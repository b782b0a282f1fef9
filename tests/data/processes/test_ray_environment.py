"""What a run needs of its environment: mended, or refused in a line, before Ray is touched."""

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest

from data.processes import ray_environment
from data.processes.ray_environment import check_ray_address, ray_folder, set_up_ray
from data.storage.errors import UserError


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the tests' own environment, and none that stays."""
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})


def refused(address: str) -> str:
    with pytest.raises(UserError) as caught:
        check_ray_address(address)
    return str(caught.value)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://127.0.0.1:10001", "the address of a Ray client server, which cannot be used. Give the host:port"),
        ("http://127.0.0.1:8265", "a URL, which cannot be used"),
        ("nonsense", "which is no host:port"),
        ("localhost:", "which is no host:port"),
        ("localhost:65536", "which is no host:port"),
    ],
)
def test_address_that_is_none_of_ray_is_refused(address, message):
    assert refused(address).startswith(f"RAY_ADDRESS is {address}, {message}")


def test_address_where_nothing_listens_is_refused():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        told = refused(address)
    assert told.startswith(f"RAY_ADDRESS is {address}, but nothing answers there: Connection refused. Give the host")


def test_address_where_something_else_listens_is_refused(monkeypatch):
    monkeypatch.setattr(ray_environment, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        told = refused(f"127.0.0.1:{silent.getsockname()[1]}")
    assert "but no Ray answers within 0.2 s. Give the host:port of a running Ray, or unset RAY_ADDRESS" in told
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        threading.Thread(target=web.handle_request, daemon=True).start()
        told = refused(f"127.0.0.1:{web.server_port}")
    assert "but what answers there is not Ray. Give the host:port" in told


def test_address_where_a_grpc_server_listens_is_taken():
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        check_ray_address(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


def test_folder_of_ray_that_is_given_is_used_or_refused(monkeypatch, tmp_path: Path):
    short = Path("/tmp") / f"r{os.getpid()}"
    short.mkdir()
    try:
        monkeypatch.setenv("RAY_TMPDIR", str(short))
        assert ray_folder() == str(short)
    finally:
        (short / "ray").rmdir()
        short.rmdir()
    long = tmp_path / ("x" * 80)
    long.mkdir()
    for folder, problem in (
        (long, "a path too long for the Unix sockets in it"),
        (Path("/proc"), "which cannot be used: No such file or directory"),
        (Path("/nonexistent/x"), "which cannot be used: No such file or directory"),
        (Path("x"), "a relative path"),
    ):
        monkeypatch.setenv("RAY_TMPDIR", str(folder))
        with pytest.raises(UserError, match=f"^RAY_TMPDIR is {folder}, {problem}. Set RAY_TMPDIR to a"):
            ray_folder()


@pytest.mark.parametrize("temporary", ["/nonexistent/x", "/proc", "/tmp/" + "x" * 80])
def test_ray_does_without_a_folder_for_temporary_files_that_does_not_fit(monkeypatch, temporary):
    monkeypatch.setenv("TMPDIR", temporary)
    assert ray_folder() == "/tmp"


def test_processes_of_ray_get_a_short_folder_for_temporary_files(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * 90)
    set_up_ray()
    assert os.environ["RAY_TMPDIR"] == os.environ["TMPDIR"] == "/tmp"


def test_own_ray_has_a_token_and_is_reached_without_a_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "intranet")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "0")
    set_up_ray()
    assert "RAY_ADDRESS" not in os.environ
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["no_proxy"] == "intranet,127.0.0.1,localhost"
    assert os.environ["NO_PROXY"] == "127.0.0.1,localhost"
    assert os.environ["RAY_TRAIN_V2_ENABLED"] == "1"
