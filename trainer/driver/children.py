"""Starts child processes that save a checkpoint when the driver's terminal is closed, and do not outlive the driver."""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data.processes.loader import signals_blocked
from trainer.driver import sweeper

_sweepers: list[subprocess.Popen[bytes]] = []
"""Kept, since each ends with its input, a pipe that is closed when this process ends."""


@contextmanager
def independent_children() -> Iterator[None]:
    """What is started inside is independent of the driver's terminal.

    A closed terminal must not end Ray before the ranks have saved, and Ctrl-Z must stop only the driver: the ranks do
    not survive a stopped Ray. Child processes inherit the blocked signals.
    """
    with _group_of_their_own(), signals_blocked(signal.SIGHUP, signal.SIGTSTP), _swept_after_the_driver():
        yield


@contextmanager
def _swept_after_the_driver() -> Iterator[None]:
    """Mark the processes that are started inside, and have them killed if they outlive this one."""
    mark = secrets.token_hex(16)
    command = [sys.executable, "-I", "-S", sweeper.__file__, f"{sweeper.VARIABLE}={mark}"]
    null = subprocess.DEVNULL
    _sweepers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=null, cwd="/"))
    os.environ[sweeper.VARIABLE] = mark
    try:
        yield
    finally:
        del os.environ[sweeper.VARIABLE]


@contextmanager
def _group_of_their_own() -> Iterator[None]:
    """Keep Ray alive to save a checkpoint when a signal reaches the driver's process group, as `timeout` sends it.

    The leader of a group cannot leave it; its children then stay in its group.
    """
    group = os.getpgrp()
    if group == os.getpid():
        yield
        return
    os.setpgid(0, 0)
    try:
        yield
    finally:
        os.setpgid(0, group)
