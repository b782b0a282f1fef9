"""Starts the process that delivers the spool, and starts it again if it dies. Nothing here waits, except `wait`."""

import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

RESTART_S = 30.0


def replay_command(run_directory: Path) -> str:
    """What a user types to deliver what is left in the spool."""
    return f"python -m trainer.tracking deliver --run {shlex.quote(str(run_directory))}"


class Courier:
    """One delivery process for the run, a child of this process that shares nothing with it but the run's folder."""

    def __init__(
        self,
        run_directory: Path,
        uri: str,
        timeout_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepare it; `start` starts it.

        Args:
            run_directory: folder of the run.
            uri: tracking URI. It goes by the environment: the arguments of a process can be read by every user.
            timeout_s: how long the process goes on failing once this one has closed the spool or died.
            clock: monotonic seconds.
        """
        self._directory = Path(os.path.abspath(run_directory))
        self._uri = uri
        self._timeout_s = timeout_s
        self._clock = clock
        self._started = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process. A failure is logged: `keep_alive` tries again."""
        self._started = self._clock()
        arguments = ["--run", str(self._directory), "--timeout", str(self._timeout_s), "--parent", str(os.getpid())]
        # The child must find this package from any folder, and a Ray worker's is a temporary one.
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        folder = self._directory / "tracking"
        try:
            with (folder / "delivery.log").open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "trainer.tracking", "deliver", *arguments],
                    env={**os.environ, "MLFLOW_TRACKING_URI": self._uri, "PYTHONPATH": path},
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        except OSError as error:
            log.warning("metrics wait in the spool: the delivery process does not start: %s", error)

    def keep_alive(self) -> None:
        """Start the process again if it died, twice a minute at most."""
        if self._clock() - self._started >= RESTART_S and (self._process is None or self._process.poll() is not None):
            self.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the process, which ends when all is delivered. Returns whether it ended with nothing left over."""
        until = self._clock() + timeout_s
        if self._process is None or self._process.poll() not in (None, 0):
            self.start()
        while self._process is not None:
            try:
                code = self._process.wait(max(0.0, until - self._clock()))
            except subprocess.TimeoutExpired:
                return False
            if code >= 0 or self._clock() >= until:
                return code == 0
            self.start()  # a signal killed it, perhaps just before the wait
        return False
