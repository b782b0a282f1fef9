"""Serve a page to try a trained model in a browser on this machine: `python -m trainer.demo --run DIR`.

Exit codes: 0, stopped with Ctrl-C or SIGTERM; 2, the command or the run is wrong, or the port is taken.
"""

import argparse
import logging
import os
import secrets
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec

from data.storage.arguments import whole_number
from data.storage.errors import UserError, as_command
from trainer.sample.draw import add_run_arguments, add_weights_argument, default_device, load_run

HOST = "127.0.0.1"


@as_command(failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.demo", description=(__doc__ or "").splitlines()[0])
    add_run_arguments(parser)
    add_weights_argument(parser)
    parser.add_argument(
        "--port", type=whole_number(1024, 65535), default=0, help=f"port on {HOST} (default: one that is free)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"the page needs {' and '.join(missing)}, which this Python does not have: install the extra demo, "
            "pip install '.[demo]'"
        )
    with _listening(options.port) as listener:
        loaded = load_run(options.run, options.checkpoint, default_device(), options.weights)
        if loaded[2].image_form.is_point:
            raise UserError("this run draws points in the plane, not images")
        from trainer.demo.server import make_server

        token = secrets.token_urlsafe(16)
        server = make_server(loaded, options.run.resolve().name, token)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        print(f"http://{HOST}:{listener.getsockname()[1]}/{token}/ (stop with Ctrl-C)", flush=True)
        with suppress(KeyboardInterrupt):
            server.run([listener])
    return 0


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"--port is {port}, {reason}: give another one, or leave it out for one that is free") from None
