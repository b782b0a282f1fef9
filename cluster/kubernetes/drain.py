"""Ask the driver on this pod to save and end, and wait for it: `python -m cluster.kubernetes.drain`.

The pod's preStop. Kubernetes itself tells only the first process of a container that the end is near, and that is Ray.
"""

import sys

import psutil

_DRIVERS = ("cluster.launch", "trainer.run")
_WAIT_S = 280.0


def drivers() -> list[psutil.Process]:
    """Processes of this machine that drive a training: `python -m cluster.launch train` or `python -m trainer.run`."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
        except psutil.Error:
            continue
        if "-m" in command and command[command.index("-m") + 1 :][:1] in ([name] for name in _DRIVERS):
            found.append(process)
    return found


def main() -> int:
    """SIGTERM to each, and wait. Exit code 0: all have ended, or there was none; 1: one is still there."""
    asked = drivers()
    for process in asked:
        process.terminate()
    return 1 if psutil.wait_procs(asked, timeout=_WAIT_S)[1] else 0


if __name__ == "__main__":
    sys.exit(main())
