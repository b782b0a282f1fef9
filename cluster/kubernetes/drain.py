"""Ask the driver in this pod to save and exit, and wait for it: `python -m cluster.kubernetes.drain`.

It is the pod's preStop hook. Kubernetes itself signals only the first process of a container, which is Ray.
"""

import os
import sys

import psutil

_DRIVERS = ("cluster.launch", "trainer.run")
_WAIT_S = 280.0


def drivers(pod: str) -> list[psutil.Process]:
    """Driver processes (`python -m cluster.launch train`, `python -m trainer.run`) in a pod.

    Args:
        pod: address of the pod, which the manifest puts into POD_IP.
    """
    found = []
    for process in psutil.process_iter():
        try:
            command, address = process.cmdline(), process.environ().get("POD_IP")
        except psutil.Error:
            continue
        module = command[command.index("-m") + 1 :][:1] if "-m" in command else []
        if address == pod and module in ([name] for name in _DRIVERS):
            found.append(process)
    return found


def main() -> int:
    """Send SIGTERM to each driver, and wait. Exit code 0: all have exited, or there were none; 1: one still runs."""
    asked = drivers(os.environ["POD_IP"])
    for process in asked:
        process.terminate()
    return 1 if psutil.wait_procs(asked, timeout=_WAIT_S)[1] else 0


if __name__ == "__main__":
    sys.exit(main())
