"""The Ray that runs take place on: the cluster in RAY_ADDRESS, or one started here that ends with this process.

Of its processes' output that of the ranks is shown. Log lines of Ray's own C++ code describe Ray's internal state and
help only its developers; errors that follow from it are also raised in Python. The driver itself says that a worker was
killed. These lines stay in Ray's log files.
"""

import logging
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
from ray._private import worker as ray_worker

from trainer.driver.children import independent_children
from trainer.driver.room import ClusterError
from trainer.engine.rendezvous import LOOPBACK

# [2026-11-28 08:25:48,839 E 21460 21573] core_worker.cc:2465: ... Fatal errors (C) end their process and are shown.
_INTERNAL_LINE = re.compile(
    r"^(\([\w-]+\) )?\[[\d-]+ [\d:,]+ [DIWE] \d+ \d+\] (\([\w-]+\) )?\S+\.(cc|h):\d+: |\[state-dump\]"
    r"|^A worker died or was killed while executing a task"
    r"|^WARNING: \d+ PYTHON worker processes have been started on node"
)


@contextmanager
def connected(*, shared: bool = False) -> Iterator[str]:
    """Connect to the cluster in RAY_ADDRESS (a Ray job sets it), or start a local Ray on this machine.

    Yields the folder, on each node, with the logs of Ray and its processes.

    Args:
        shared: other drivers will connect to a local Ray as to a cluster.

    Raises:
        ClusterError: no Ray answers, or none can be started.
    """
    address = os.environ.get("RAY_ADDRESS")
    try:
        context: Any = ray.init(address=address, logging_level=logging.WARNING) if address else _start_local_ray(shared)
    except Exception as error:  # Ray raises errors of many types, some with a whole log file as message
        where = f"the Ray at {address}" if address else "a local Ray"
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ClusterError(f"cannot connect to {where}: {reason}") from error
    try:
        _leave_out_ray_internals()
        yield f"{context['session_dir']}/logs"
    finally:
        ray.shutdown()


def is_local() -> bool:
    """Whether the Ray of this process ends with it, and nobody else uses it."""
    return not os.environ.get("RAY_ADDRESS")


def _start_local_ray(shared: bool) -> Any:
    """Start a Ray, with a dashboard only if it is shared: that is ten processes, for the state of a cluster."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    if shared:
        # Ray Train's processes ask the dashboard for the state of their actors; they inherit its address from here.
        # Otherwise they use the last Ray started by hand on this machine, running or not.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{LOOPBACK}:{port}"
    with independent_children():
        return ray.init(
            address="local",
            include_dashboard=shared,
            dashboard_host=LOOPBACK,
            dashboard_port=port,
            _node_ip_address=LOOPBACK,
            logging_level=logging.WARNING,
        )


def without_ray_internals(lines: Iterable[str]) -> list[str]:
    """The lines that are neither log lines of Ray's C++ code nor its notices of its own processes."""
    return [line for line in lines if not _INTERNAL_LINE.search(line)]


def _leave_out_ray_internals() -> None:
    """Filter what Ray prints of its processes' output with `without_ray_internals`. Ray has no setting for it."""
    show = ray_worker.print_worker_logs
    if not isinstance(show, partial):  # not yet filtered by this process
        ray_worker.print_worker_logs = partial(_show_output, show)


def _show_output(show: Callable[..., None], data: dict[str, Any], *more: Any, **options: Any) -> None:
    show({**data, "lines": without_ray_internals(data["lines"])}, *more, **options)
