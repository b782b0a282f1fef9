"""A web address on this machine that notes what is posted to it."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hook:
    """Attributes:
    address: where to post.
    got: what was posted and taken.
    answers: the statuses of the next answers, then 200.
    release: an answer waits until it is set.
    """

    address: str
    got: list[dict[str, Any]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)

    @property
    def events(self) -> list[str]:
        return [content["event"] for content in self.got]


@contextmanager
def hooked(*, answers: Sequence[int] = (), hangs: bool = False) -> Iterator[Hook]:
    hook = Hook("", answers=list(answers))
    if not hangs:
        hook.release.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            hook.release.wait()
            status = hook.answers.pop(0) if hook.answers else 200
            if status == 200:
                hook.got.append(content)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hook.address = f"http://127.0.0.1:{server.server_port}/services/secret"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hook
    finally:
        hook.release.set()
        server.shutdown()
        server.server_close()
