"""A page that is served in this process, and a client of it."""

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from socket import create_server
from threading import Thread
from typing import Any
from urllib.parse import urlencode

import torch

from models.diffusion import Diffusion
from trainer.checkpoint.snapshot import build_generator
from trainer.config.io import load_config
from trainer.demo.server import make_server
from trainer.sample.draw import Loaded

TOKEN = "right-token"


def untrained(overrides: list[str]) -> Loaded:
    """A model with random weights, whose images differ from each other."""
    config = load_config("digits", [*overrides, "run.directory=unused"])
    torch.manual_seed(0)
    generator = build_generator(config).eval().requires_grad_(False)
    for parameter in generator.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)  # the output layer begins near zero
    return generator, Diffusion.from_config(config.diffusion), config


@dataclass(frozen=True)
class Client:
    """Asks a server on a port of this machine."""

    port: int

    def ask(
        self, path: str, body: bytes | None = None, method: str | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Status, content and headers of an answer to a request with exactly this path."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
        finally:
            connection.close()

    def act(self, action: str, words: Mapping[str, Any], content: bytes = b"") -> tuple[int, bytes]:
        """Status and content of the answer to a form."""
        return self.ask(f"/{TOKEN}/{action}?{urlencode(words)}", content)[:2]

    def images(self, action: str, words: Mapping[str, Any], content: bytes = b"", width: int = 8) -> torch.Tensor:
        """The pictures that a form is answered with, uint8 [N, 1, 8, width]."""
        status, pixels = self.act(action, words, content)
        assert status == 200, pixels
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 1, 8, width)

    def facts(self) -> dict[str, Any]:
        return json.loads(self.ask(f"/{TOKEN}/model")[1])


@contextmanager
def served(loaded: Loaded) -> Iterator[Client]:
    """A client of a server that runs in a thread."""
    server = make_server(loaded, "run", TOKEN)
    with create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()  # what is asked before it accepts waits at the socket
        try:
            yield Client(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(60)
