"""Signals that ask for a stop, and output after the terminal is gone."""

import errno
import os
import signal
import termios
import time
from collections.abc import Callable
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""They ask a run to save and stop. SIGHUP comes when its terminal is closed."""
SAME_REQUEST_S = 1.0
"""Signals within this time are one request: a terminal signals all processes of a job, and torchrun or `timeout`
signals them again."""


class StopRequest:
    """Whether a signal has asked for a stop. A second request, later, is that of a user who does not want to wait.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.asked = False
        self._clock, self._asked_at = clock, 0.0

    def note(self) -> bool:
        """Note a signal; returns whether it is a second request."""
        leave_dead_terminal()  # a shell that exits sends SIGTERM to stopped jobs, and SIGHUP later
        again = self.asked and self._clock() - self._asked_at > SAME_REQUEST_S
        if not self.asked:
            self.asked, self._asked_at = True, self._clock()
        return again


def handle_stop_signals(handler: Callable[[int, object], None]) -> dict[int, Any]:
    """Set a handler for `STOP_SIGNALS`, except for a SIGHUP that is ignored, as under nohup.

    Returns:
        The former handlers.
    """
    numbers = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def leave_dead_terminal() -> None:
    """Discard further output if its terminal is gone: each write would be an error."""
    for descriptor in (1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)
