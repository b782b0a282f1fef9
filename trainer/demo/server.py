"""Answers the page's requests on 127.0.0.1, to those who know the token in its address.

Another user of the machine, and a web page of another site in the same browser, can reach the port too. Neither knows
the token, which is the first part of every path: what is below it says nothing to others, not even that it exists.
"""

import asyncio
import hmac
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import FrameType

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from data.images.decode import BadImageError
from data.storage.errors import StoppedError, UserError
from models.shapes import Uint8Image
from trainer.demo.actions import ACTIONS, Asked, facts
from trainer.sample.draw import Loaded
from trainer.sample.images import to_pictures

PAGE = Path(__file__).parent / "page"
HOSTS = ("127.0.0.1", "localhost")
"""Names of this machine, with any port: it may be forwarded. A site whose own name leads here has another one."""
MAX_BYTES = 16 * 2**20
"""Of a request: a photograph as cameras write it."""
MAX_OPEN = 100
"""Connections and requests at a time; a browser opens six."""
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
"""Of every answer: the browser asks no other host, and hands the address to none."""


class Queue:
    """Draws in one thread, in the order in which it is asked: a model serves one at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._stopped = Event()

    async def images(self, batches: Iterator[Uint8Image]) -> Uint8Image:
        """All images of some batches, once those who asked before have theirs.

        Raises:
            StoppedError: `stop` was called.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._drawn, batches)

    def _drawn(self, batches: Iterator[Uint8Image]) -> Uint8Image:
        drawn = []
        while not self._stopped.is_set():
            if (batch := next(batches, None)) is None:
                return torch.cat(drawn)
            drawn.append(batch)
        raise StoppedError("the server was stopped")

    def stop(self) -> None:
        """End all work, what is being drawn at its next batch."""
        self._stopped.set()


def _application(loaded: Loaded, name: str, token: str, queue: Queue) -> ASGIApp:
    """The page, what it must know of the model, and its actions, all below the token."""
    known = facts(loaded[2], name, MAX_BYTES)

    async def tell(_: Request) -> Response:
        return JSONResponse(known)

    async def act(request: Request) -> Response:
        action = ACTIONS.get(request.path_params["action"])
        if action is None:
            return PlainTextResponse("the page has no such form", 404)
        asked = Asked(request.query_params, await request.body())
        images = await queue.images(action(loaded, asked))
        pixels = to_pictures(images).contiguous().numpy()
        return Response(pixels.tobytes(), media_type="application/octet-stream")  # uint8 [N, 1 or 3, H, W]

    routes = [
        Route("/model", tell),
        Route("/{action}", act, methods=["POST"]),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    handlers = dict.fromkeys((UserError, BadImageError, StoppedError), _refused)
    return _Guard(Starlette(routes=[Mount(f"/{token}", routes=routes)], exception_handlers=handlers), token)


async def _refused(_: Request, error: Exception) -> Response:
    said = f"the file {error}" if isinstance(error, BadImageError) else str(error)
    return PlainTextResponse(said, 503 if isinstance(error, StoppedError) else 400)


class _Guard:
    """Passes on the requests of the page itself, and answers all others: 403, or 411 and 413 for a body."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        first = scope["path"].removeprefix("/").partition("/")[0].encode(errors="replace")
        if host.partition(":")[0] not in HOSTS or (origin is not None and origin != f"http://{host}"):
            return PlainTextResponse("requests from other hosts and pages are refused", 403)
        if not hmac.compare_digest(first, self._token):
            return PlainTextResponse("the whole address is needed, as trainer.demo printed it", 403)
        if scope["method"] not in ("GET", "HEAD") and "content-length" not in headers:
            return PlainTextResponse("a body must come whole, with its Content-Length", 411)
        if int(headers.get("content-length", "0")) > MAX_BYTES:
            return PlainTextResponse(f"the file is larger than {MAX_BYTES // 2**20} MB", 413)
        return None


class _Server(uvicorn.Server):
    """Ends what is being drawn when it is told to end, so that it can."""

    def __init__(self, config: uvicorn.Config, queue: Queue) -> None:
        super().__init__(config)
        self._queue = queue

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._queue.stop()
        super().handle_exit(sig, frame)


def make_server(loaded: Loaded, name: str, token: str) -> uvicorn.Server:
    """A server of the page; its `run` takes a socket that listens, and raises KeyboardInterrupt after SIGINT.

    Args:
        loaded: the model.
        name: of its run.
        token: the first part of each path.
    """
    queue = Queue()
    config = uvicorn.Config(
        _application(loaded, name, token, queue),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        log_level="error",
        server_header=False,
        headers=list(HEADERS.items()),
        limit_concurrency=MAX_OPEN,
    )
    return _Server(config, queue)
