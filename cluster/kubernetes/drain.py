"""Ask the driver on this pod to save and end, and wait for it: `python -m cluster.kubernetes.drain`.

The pod's preStop. Kubernetes itself tells only the first process of a container that the end is near, and that is Ray.
"""

import os
import sys

import psutil

_DRIVERS = ("cluster.launch", "trainer.run")
_WAIT_S = 280.0


def drivers(pod: str) -> list[psutil.Process]:
    """Processes that drive a training (`python -m cluster.launch train`, `python -m trainer.run`) in a pod.

    Args:
        pod: its address, which the manifest puts into POD_IP.
    """
    found = []
    for process in psutil.process_iter():
        try:
            command, there = process.cmdline(), process.environ().get("POD_IP")
        except psutil.Error:
            continue
        module = command[command.index("-m") + 1 :][:1] if "-m" in command else []
        if there == pod and module in ([name] for name in _DRIVERS):
            found.append(process)
    return found


def main() -> int:
    """SIGTERM to each, and wait. Exit code 0: all have ended, or there was none; 1: one is still there."""
    asked = drivers(os.environ["POD_IP"])
    for process in asked:
        process.terminate()
    return 1 if psutil.wait_procs(asked, timeout=_WAIT_S)[1] else 0


if __name__ == "__main__":
    sys.exit(main())
