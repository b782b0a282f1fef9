"""Ends what a killed driver left of its Ray. Run as a script by the driver; it imports nothing heavy.

Its standard input ends with the driver, however that ends. Ray's own processes then end too, most of them at once, but
an agent may stay. Processes are recognized by an environment variable that only those of this Ray have inherited, and
by the driver's session: what a rank has moved into another session, such as the delivery of curves, is left alone.

Arguments: the variable with its value, NAME=VALUE.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

VARIABLE = "DDGAN_LOCAL_RAY"
"""Environment variable of all processes of a Ray that a driver has started."""
GRACE_S = 10.0
"""Time that Ray's processes have to end by themselves."""
_LOOK_EVERY_S = 0.5


def processes(mark: str) -> list[int]:
    """The processes of this session with this NAME=VALUE in their initial environment, without this one."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with suppress(OSError):  # it has ended, or belongs to somebody else
                is_marked = mark.encode() in (folder / "environ").read_bytes().split(b"\0")
                if is_marked and os.getsid(int(folder.name)) == os.getsid(0):
                    found.append(int(folder.name))
    return found


def sweep(mark: str) -> None:
    """Wait for the processes to end; after `GRACE_S` kill those that are left."""
    ended_at = time.monotonic()
    while left := processes(mark):
        if time.monotonic() - ended_at > GRACE_S:
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(_LOOK_EVERY_S)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(0, 1)
    sweep(sys.argv[1])
