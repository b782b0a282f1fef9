"""Shows a store of runs in MLflow to its owner only: called by `./launch.sh ui`.

MLflow serves whatever its user can read, without a password. Here it listens on a Unix socket in a private folder; a
proxy on 127.0.0.1 asks for a random password, and refuses requests from pages of other origins as well as artifact
locations outside the store.
"""

import argparse
import base64
import binascii
import hmac
import http.client
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cluster.request import ROOT
from data.storage.arguments import whole_number
from data.storage.errors import OperationError, UserError, as_command

HOST = "127.0.0.1"
USER = "ddgan"
START_S = 120.0
_MAX_BODY = 64 * 2**20
_CHUNK = 2**16
_PLACES = {"artifactlocation", "artifacturi", "source", "sourceuri", "storagelocation", "artifactroot"}
"""Fields of MLflow's requests that name a place of artifacts, without underscores and in lower case."""
_STORE = ("mlflow-artifacts:/", "runs:/", "models:/")
_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}


def outside_place(value: Any) -> str | None:
    """The first artifact location in a JSON request that is not in the store, or None."""
    match value:
        case str() if value.lstrip()[:1] in ("{", "["):  # MLflow also accepts JSON in a string
            try:
                return outside_place(json.loads(value))
            except ValueError:
                return None
        case list():
            return next((place for item in value if (place := outside_place(item))), None)
        case dict():
            named = {value["key"]: value.get("value")} if isinstance(value.get("key"), str) else {}
            for name, item in (*value.items(), *named.items()):
                plain = str(name).rpartition(".")[2].replace("_", "").lower()
                if plain in _PLACES and isinstance(item, str) and item and not _is_inside(item):
                    return item
                if place := outside_place(item):
                    return place
    return None


def _is_inside(place: str) -> bool:
    return place.startswith(_STORE) and not {"..", "%"} & {*place.replace("\\", "/").split("/"), *place}


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


class StoreProxy(ThreadingHTTPServer):
    """Passes requests that know the password on to an MLflow server behind a Unix socket."""

    daemon_threads = True

    behind: Path
    """The socket; set it before `serve_forever`."""

    def __init__(self, port: int, password: str) -> None:
        """Listen on 127.0.0.1.

        Raises:
            UserError: the port is taken; names a free one.
        """
        self.credentials = f"{USER}:{password}".encode()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            free = next((p for p in [*range(port, 65536), *range(port, 1023, -1)] if _is_free(p)), None)
            told = f"{free} is free: ./launch.sh ui --port {free}" if free else "no port of this machine is free"
            raise UserError(f"port {port} is taken; {told}") from error


class _Handler(BaseHTTPRequestHandler):
    server: StoreProxy  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = 600

    def _pass_on(self) -> None:
        try:
            if not self._is_allowed():
                return
            body = self._body()
            if body is not None:
                self._forward(body)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not isinstance(error, ConnectionError):
                self._refuse(502, f"no answer from MLflow: {error}")

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _pass_on  # noqa: N815

    def _is_allowed(self) -> bool:
        own = {f"{host}:{self.server.server_port}" for host in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in own or (origin is not None and origin.removeprefix("http://") not in own):
            self._refuse(403, "requests from other hosts and pages are refused")
        elif not hmac.compare_digest(self._given_credentials(), self.server.credentials):
            self._refuse(401, f"user {USER} and the password that ./launch.sh ui printed", "WWW-Authenticate")
        else:
            return True
        return False

    def _given_credentials(self) -> bytes:
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        try:
            return base64.b64decode(given, validate=True) if scheme.lower() == "basic" else b""
        except (binascii.Error, ValueError):
            return b""

    def _body(self) -> bytes | None:
        """The request's body; None if it was refused."""
        if "Transfer-Encoding" in self.headers or self.headers.get("Content-Encoding", "identity") != "identity":
            return self._refuse(411, "bodies must be sent whole and as they are, with a Content-Length")
        length = int(self.headers.get("Content-Length", 0))
        if not 0 <= length <= _MAX_BODY:
            return self._refuse(413, f"bodies may have up to {_MAX_BODY} bytes")
        body = self.rfile.read(length)
        try:
            place = outside_place(json.loads(body))
        except (ValueError, RecursionError):
            place = None  # not JSON: MLflow reads no fields from it either
        if place:
            return self._refuse(403, f"artifact location {place!r} is outside of the store: leave it out")
        return body

    def _forward(self, body: bytes) -> None:
        connection = _UnixConnection(self.server.behind)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in {*_HOP, "authorization", "content-length"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.putheader("Connection", "close")
            connection.endheaders(body)
            answer = connection.getresponse()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            while chunk := answer.read1(_CHUNK):
                self.wfile.write(chunk)
        finally:
            connection.close()

    def _refuse(self, status: int, text: str, header: str = "") -> None:
        content = f"{text}\n".encode(errors="replace")
        self.send_response_only(status)
        if header:
            self.send_header(header, 'Basic realm="runs"')
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def mlflow_behind(store: Path, artifacts: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Run MLflow on a Unix socket that only this user can reach; yields the socket and the process.

    Raises:
        OperationError: it ends before it answers, or does not answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="ddgan-ui-") as folder:  # mode 700
        place = Path(folder) / "mlflow"
        process = subprocess.Popen(
            [
                *[sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{store}"],
                *["--artifacts-destination", str(artifacts), "--workers", "1"],
                *["--uvicorn-opts", shlex.join(["--uds", str(place)])],
            ],
            # MLflow's jobs would need a server without a password.
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
        try:
            _await_answer(place, process)
            yield place, process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_answer(place: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise OperationError(f"MLflow ended with exit code {process.returncode}: see its messages above")
        connection = _UnixConnection(place)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            time.sleep(0.1)
        finally:
            connection.close()
    raise OperationError(f"MLflow did not answer within {START_S:.0f} s")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server: a port just left is free
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


@as_command(name="launch.sh")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 0: stopped with Ctrl-C or SIGTERM; 1: MLflow failed; 2: no store, or a port in use."""
    parser = argparse.ArgumentParser(prog="./launch.sh ui", description=__doc__, allow_abbrev=False)
    parser.add_argument("--port", type=whole_number(0, 65535), default=5000, help="port on 127.0.0.1 (default: 5000)")
    port = parser.parse_args(arguments).port
    store = ROOT / "runs" / "mlflow.db"
    if not store.is_file():
        raise UserError(f"there is no {store} yet: train first, with ./launch.sh quickstart or train")
    return serve(store, port)


def serve(store: Path, port: int) -> int:
    """Serve a store until SIGINT, SIGTERM or MLflow's end; the password is printed once, to stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    password = secrets.token_urlsafe(16)
    with StoreProxy(port, password) as proxy:
        try:
            with mlflow_behind(store, store.parent / "mlartifacts") as (place, process):
                proxy.behind = place
                threading.Thread(target=proxy.serve_forever, daemon=True).start()
                sys.stderr.write(
                    f"launch.sh: http://{HOST}:{proxy.server_port} (stop with Ctrl-C)\n"
                    f"launch.sh: user {USER}, password {password}\n"
                )
                sys.stderr.flush()
                try:
                    code = process.wait()
                finally:
                    proxy.shutdown()
        except KeyboardInterrupt:
            return 0
    raise OperationError(f"MLflow ended with exit code {code}: see its messages above")


if __name__ == "__main__":
    sys.exit(main())
