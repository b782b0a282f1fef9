"""An HTTP server on loopback that serves a folder, and fails when it is told to."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path

_PLACES = ("/data/set", "/images/set")
"""Paths under which the folder is served; the second one as a bucket of S3."""

_CHUNK_BYTES = 2**18


@dataclass(frozen=True)
class Fault:
    """What happens to a request instead of a whole, right answer."""

    status: int | None = None
    """Answer with this status."""
    cut_after: int | None = None
    """Close the connection after so many bytes of the content."""
    stall_after: int | None = None
    """Send nothing more after so many bytes."""
    hangs_up: bool = False
    """Close the connection without an answer."""
    altered: bool = False
    """Change a byte of the content."""
    content: bytes | None = None
    """Serve this instead."""


@dataclass
class FaultyServer:
    """The server's side that a test steers and asks."""

    folder: Path
    url: str = ""
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    """By file name: each GET takes the first one, until none is left."""
    always: Fault | None = None
    """For every request that has none of its own."""
    delay_s: float = 0.0
    """Time before each answer, as on the way to a server far away."""
    bytes_per_s: float | None = None
    """Bound on what all connections together carry; None: none."""
    gets: Counter[str] = field(default_factory=Counter)
    """GET requests by file name."""
    ranges: list[str | None] = field(default_factory=list)
    """The header Range of each GET request."""
    ignores_ranges: bool = False
    """Sends whole files only."""
    authorizations: set[str | None] = field(default_factory=set)
    """The headers of that name."""
    stalled: threading.Event = field(default_factory=threading.Event)
    """Set when a request stalls."""
    released: threading.Event = field(default_factory=threading.Event)
    """Set to continue those that stall."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    free_at: float = 0.0
    """When the line has carried everything so far, on the monotonic clock."""

    def fault(self, name: str, *, is_get: bool) -> Fault:
        """The fault of a request that has come in."""
        with self.lock:
            if is_get:
                self.gets[name] += 1
                if self.faults.get(name):
                    return self.faults[name].pop(0)
            return self.always or Fault()

    def carry(self, stream: BufferedIOBase, content: bytes) -> None:
        """Write bytes to a connection no faster than the line is."""
        for start in range(0, len(content), _CHUNK_BYTES):
            chunk = content[start : start + _CHUNK_BYTES]
            if self.bytes_per_s is not None:
                with self.lock:
                    self.free_at = max(self.free_at, time.monotonic()) + len(chunk) / self.bytes_per_s
                    wait_s = self.free_at - time.monotonic()
                time.sleep(max(0.0, wait_s))
            stream.write(chunk)


@contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    """Serve a folder on a free port of 127.0.0.1."""
    state = FaultyServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(is_get=False)

        def do_GET(self) -> None:
            self._answer(is_get=True)

        def _answer(self, *, is_get: bool) -> None:
            state.authorizations.add(self.headers.get("Authorization"))
            place, _, name = self.path.rpartition("/")
            fault = state.fault(name, is_get=is_get)
            if fault.hangs_up:
                self.close_connection = True
                return
            file = state.folder / name
            status = fault.status or (200 if file.is_file() and place in _PLACES else 404)
            content = (fault.content or file.read_bytes()) if status == 200 else b"no"
            place_in_file = ""
            if is_get:
                state.ranges.append(asked := self.headers.get("Range"))
                if asked and status == 200 and not state.ignores_ranges:
                    first, last = asked.removeprefix("bytes=").split("-")
                    start, end = int(first), int(last or len(content) - 1) + 1
                    place_in_file = f"bytes {start}-{min(end, len(content)) - 1}/{len(content)}"
                    status, content = 206, content[start:end]
            if fault.altered:
                content = content[:600] + bytes([content[600] ^ 1]) + content[601:]
            time.sleep(state.delay_s)
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status == 206:
                self.send_header("Content-Range", place_in_file)
            self.end_headers()
            if not is_get:
                return
            stops_at = fault.cut_after if fault.stall_after is None else fault.stall_after
            state.carry(self.wfile, content[:stops_at])
            self.wfile.flush()
            if fault.stall_after is not None:
                state.stalled.set()
                state.released.wait(60)
                self.wfile.write(content[stops_at:])
            if fault.cut_after is not None:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Clients that went away are expected."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_port}{_PLACES[0]}"
        try:
            yield state
        finally:
            state.released.set()
            server.shutdown()
            thread.join()
