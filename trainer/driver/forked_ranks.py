"""A group of ranks on this machine, as torchrun starts one, but forked from a process that has the modules loaded.

That saves the seconds in which each rank would import torch and DeepSpeed, for commands that start many groups.
"""

import gc
import multiprocessing
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from data.storage.errors import OperationError

_GRACE_S = 30.0
"""Between SIGTERM, after which a rank saves, and SIGKILL for the ranks of a group in which another one has failed."""
_FORKS = multiprocessing.get_context("forkserver")

Main = Callable[[Sequence[str]], int]
"""What a rank runs with its arguments: a function of a module. It returns the exit code."""


class TookTooLongError(OperationError):
    """A group did not end in time, and was killed."""


def load_before_forking(*modules: str) -> None:
    """Name the modules that the process which all later groups are forked from has loaded; call it before the first."""
    _FORKS.set_forkserver_preload(list(modules))


def run_group(
    ranks: int, main: Main, arguments: Sequence[str], *, log: Path, errors: Path | None = None, timeout_s: float = 1e6
) -> int:
    """Run a group of ranks to its end: when one fails, the others are stopped. They have this process's environment.

    Args:
        ranks: number of processes; one alone gets no group.
        main: see `Main`.
        arguments: of `main`.
        log: file to which all of them append what they print.
        errors: file for their standard error; None: the log.
        timeout_s: after this time all are killed.

    Returns:
        The first exit code that is not 0, else 0; negative for a signal.

    Raises:
        TookTooLongError: after `timeout_s`.
    """
    ends_at = time.monotonic() + timeout_s
    group = _group(ranks) if ranks > 1 else {}
    started = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if group else {}
        environment = {**os.environ, **group, **place}
        started.append(_FORKS.Process(target=_run, args=(main, arguments, log, errors or log, environment)))
    code, alive = 0, {}
    try:
        for process in started:
            process.start()
            alive[process.sentinel] = process
        while alive:
            ended = wait(list(alive), timeout=max(0.0, ends_at - time.monotonic()))
            if not ended and code:  # in a collective that nobody joins any more
                break
            if not ended:
                raise TookTooLongError(f"{len(alive)} of {ranks} ranks have not ended in {timeout_s:g} s")
            for process in [alive.pop(sentinel) for sentinel in ended]:  # pyright: ignore[reportArgumentType]
                process.join()
                code = code or process.exitcode or 0
            if code:
                ends_at = min(ends_at, time.monotonic() + _GRACE_S)
                for process in alive.values():
                    process.terminate()
    finally:
        for process in alive.values():
            process.kill()
            process.join()
    return code


def _group(ranks: int) -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return group | {"LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": uuid.uuid4().hex}


def _run(main: Main, arguments: Sequence[str], log: Path, errors: Path, environment: Mapping[str, str]) -> None:
    """One rank, in a process of its own."""
    gc.freeze()  # a million objects of the loaded modules; ZeRO-3 collects at each start, and would walk them all
    os.environ.clear()  # it has that of the process that it is forked from, as it was when that one started
    os.environ.update(environment)
    for stream, file in ((1, log), (2, errors)):
        with file.open("ab", buffering=0) as output:
            os.dup2(output.fileno(), stream)
    sys.exit(main(arguments))
