"""Start method of the loader processes: a fork server that never imports the program's main module.

Forking the rank itself is unsafe: gloo, NCCL, Ray and DeepSpeed run threads, and a fork copies their locks in any
state. `spawn` is safe but imports torch (2 s) in every process. A fork server starts once as a fresh interpreter,
imports the heavy libraries once, and forks each loader process from that single-threaded state.

Python's own fork server context still imports the program's main module in every child, here the trainer with
DeepSpeed (5 s and hundreds of megabytes each). It also lets a signal for the rank end its loaders. The variant below
does neither.
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
from data.processes.sockets import use_short_socket_folder

_PRELOADED = ["torch", "webdataset", "simplejpeg", "PIL.Image", "pydantic"]
"""Third-party only: the server has another import path, and skips modules that it does not find."""
_RANK_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""A terminal or Slurm sends these to all processes of a job. The rank handles them and still needs its loaders."""
_SERVER = forkserver.ForkServer()


_SERVER.set_forkserver_preload(_PRELOADED)


@contextlib.contextmanager
def signals_blocked(*signals: signal.Signals) -> Iterator[None]:
    """Block signals in this thread; processes started inside inherit the mask for life."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


class _LoaderPopen(popen_forkserver.Popen):
    """Launches through our own server, without the main module."""

    def _launch(self, process_obj: BaseProcess) -> None:
        # As in the base class, except for the two popped entries and the server.
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
        use_short_socket_folder()
        # Start it before signals are blocked: its start unblocks signals.
        resource_tracker.ensure_running()
        with signals_blocked(*_RANK_SIGNALS):
            self.sentinel, write_end = _SERVER.connect_to_new_process(self._fds)  # pyright: ignore[reportAttributeAccessIssue]
        # The child sees this duplicate close when the rank ends: see `initialize_loader`.
        parent_end = os.dup(write_end)
        self.finalizer = util.Finalize(self, _close_both, (parent_end, self.sentinel))
        with open(write_end, "wb", closefd=True) as stream:
            stream.write(payload.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)

    def terminate(self) -> None:
        # A loader process blocks SIGTERM, and has nothing to save.
        self.kill()


def _close_both(first: int, second: int) -> None:
    os.close(first)
    os.close(second)


class LoaderProcess(ForkServerProcess):
    """A loader process; public only because the child looks up its class by name."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _LoaderPopen:  # noqa: N802
        return _LoaderPopen(process_obj)


class LoaderContext(ForkServerContext):
    """The `multiprocessing_context` of a DataLoader."""

    Process = LoaderProcess  # pyright: ignore[reportAssignmentType]


def initialize_loader(_worker_id: int) -> None:
    """Prepare a loader process: use one thread for arithmetic, and end with the rank."""
    torch.set_num_threads(1)
    # The DataLoader's own watchdog checks the parent's pid. Here that is the fork server, which lives as long as its
    # children: after a killed rank they would wait forever.
    end_with_parent()
