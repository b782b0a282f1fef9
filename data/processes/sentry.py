"""A small process next to each rank that kills the rank when its watchdog can no longer do so.

It is run as a script and imports nothing else, so that it starts at once and stays small. The rank's watchdog writes to
its standard input how many seconds it may be silent from now on. It falls silent when the main thread keeps Python's
lock (GIL). Time in which the rank, or this process, is stopped or frozen does not count.

Arguments: the number of the rank. It ends when the rank does.
"""

import math
import os
import select
import signal
import sys
import time
from pathlib import Path

STACKS_SIGNAL = signal.SIGRTMIN + 11
"""On this signal the rank writes the stacks of its threads to stderr, without Python's lock."""
RECORD_BYTES = 16
_TICK_S = 0.2
_WRITING_S = 2.0


def record(seconds: float) -> bytes:
    """The message that allows so many seconds of silence."""
    return f"{seconds:{RECORD_BYTES - 1}.2f}\n".encode()


def watch(parent: int, rank: str) -> None:
    """Wait until the rank ends, or has been silent for too long."""
    allowed_s, silent_s = math.inf, 0.0
    while True:
        # Ticks are counted, not seconds: no clock tells how long a process was stopped.
        if select.select([0], [], [], _TICK_S)[0]:
            content = os.read(0, 4096 * RECORD_BYTES)
            if not content:
                return
            allowed_s, silent_s = float(content[-RECORD_BYTES:]), 0.0
        elif os.getppid() != parent:
            return
        elif not _is_stopped(parent):
            silent_s += _TICK_S
        if silent_s > allowed_s:
            message = (
                f"watchdog: rank {rank} (process {parent}) has made no progress, and its main thread keeps Python's "
                "lock. It is killed; the run can be resumed\n"
            )
            os.write(2, message.encode())
            os.kill(parent, STACKS_SIGNAL)
            time.sleep(_WRITING_S)
            os.kill(parent, signal.SIGKILL)
            return


def _is_stopped(pid: int) -> bool:
    try:
        # The name, in parentheses, may contain any characters.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    watch(os.getppid(), sys.argv[1])
