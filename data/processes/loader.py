"""Start method of the loader processes: a fork server that never imports the program's main module.

Forking the rank itself is unsafe, since gloo, NCCL, Ray and DeepSpeed run threads whose locks a fork copies in any
state. `spawn` is safe but imports torch (2 s) in every process. A fork server is started once as a fresh interpreter,
imports the heavy libraries once, and forks each loader process from that quiet state.

Python's own fork server context would still import the program's main module in every child, here the trainer with
DeepSpeed (5 s and hundreds of megabytes each), and would let a signal that is meant for the rank end its loaders. Hence
the small variant below.
"""

import contextlib
import io
import os
import signal
from collections.abc import Iterator
from multiprocessing import forkserver, popen_forkserver, reduction, resource_tracker, spawn, util
from multiprocessing.context import ForkServerContext, ForkServerProcess, set_spawning_popen
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from data.processes.child import end_with_parent

_PRELOADED = ["torch", "webdataset", "simplejpeg", "PIL.Image", "pydantic"]
"""Third-party only: the server's import path is not the program's, and it skips what it does not find."""


_RANK_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""A terminal or Slurm sends these to every process of a job; the rank decides, and still needs its loaders then."""


_SERVER = forkserver.ForkServer()


_SERVER.set_forkserver_preload(_PRELOADED)


@contextlib.contextmanager
def signals_blocked(*signals: signal.Signals) -> Iterator[None]:
    """Block signals in this thread; what is started inside inherits that for its whole life."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


class _LoaderPopen(popen_forkserver.Popen):
    """Launches through our own server, without the main module."""

    def _launch(self, process_obj: BaseProcess) -> None:
        # As in the base class, but for the two popped entries and for the server.
        preparation: dict[str, Any] = spawn.get_preparation_data(process_obj.name)
        preparation.pop("init_main_from_name", None)
        preparation.pop("init_main_from_path", None)
        payload = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(preparation, payload)
            reduction.dump(process_obj, payload)
        finally:
            set_spawning_popen(None)
        # Started here if need be, since it unblocks signals when it starts.
        resource_tracker.ensure_running()
        with signals_blocked(*_RANK_SIGNALS):
            self.sentinel, write_end = _SERVER.connect_to_new_process(self._fds)  # pyright: ignore[reportAttributeAccessIssue]
        # The child sees the end of this duplicate when the rank is gone: see `initialize_loader`.
        parent_end = os.dup(write_end)
        self.finalizer = util.Finalize(self, _close_both, (parent_end, self.sentinel))
        with open(write_end, "wb", closefd=True) as stream:
            stream.write(payload.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)

    def terminate(self) -> None:
        # SIGTERM is blocked in a loader process, which holds nothing that it would have to save.
        self.kill()


def _close_both(first: int, second: int) -> None:
    os.close(first)
    os.close(second)


class LoaderProcess(ForkServerProcess):
    """A loader process; public only because the child finds its class by name."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _LoaderPopen:  # noqa: N802
        return _LoaderPopen(process_obj)


class LoaderContext(ForkServerContext):
    """The `multiprocessing_context` of a DataLoader."""

    Process = LoaderProcess  # pyright: ignore[reportAssignmentType]


def initialize_loader(_worker_id: int) -> None:
    """What a loader process does first: one thread for its arithmetic, and no life without its rank."""
    torch.set_num_threads(1)
    # The DataLoader's own watchdog compares the parent's pid, but here that is the server, which lives as long as its
    # children do: a killed rank would leave them waiting for ever.
    end_with_parent()
