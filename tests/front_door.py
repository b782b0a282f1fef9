"""A copy of launch.sh in its own folder, with a fake Python that records its calls.

So the tests never install a real environment; `./launch.sh test` on a fresh checkout does that.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.launch import ROOT, environment

INSTALLING = ["/dev/fd/", "/requirements.lock", "--editable"]
STAND_IN = f"""#!/usr/bin/env bash
case "$*" in
    "-m venv --clear "*)
        rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; touch "$4/pyvenv.cfg"; echo "venv" >>"$CALLS" ;;
    "-m pip --version") ;;
    "-m pip install "*) echo "$*" >>"$CALLS"; eval "${{ON_INSTALL:-}}" ;;
    "-m "*)
        if [[ -z ${{RECORD:-}} ]]; then exec {sys.executable} "$@"; fi
        printf '%s:%s\\n' "$PWD" "$(printf ' [%s]' "${{@:2}}")" >>"$CALLS"; eval "${{ON_RUN:-}}" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


class Machine:
    """A checkout of launch.sh and the lock file in its own folder, and a Python that records its calls."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "check out"  # spaces in paths are common
        (self.checkout / ".ci").mkdir(parents=True)
        for name in ("launch.sh", "requirements.lock", ".ci/run"):
            shutil.copy(ROOT / name, self.checkout / name)
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.venv = self.checkout / ".venv"
        self.python = script(folder / "python", STAND_IN)
        self.calls_file = folder / "calls"
        self.calls_file.touch()

    def finish_set_up(self) -> None:
        """Create what a finished set-up leaves, so that launch.sh starts a command at once."""
        (self.venv / "bin").mkdir(parents=True)
        shutil.copy(self.python, self.venv / "bin/python")
        (self.venv / "pyvenv.cfg").touch()
        lock = (self.checkout / "requirements.lock").read_text()
        (self.venv / "ddgan-setup").write_text(f"{self.checkout}\n{lock}")

    def start(self, *arguments: str, program: str = "launch.sh", **variables: str) -> subprocess.Popen[str]:
        """Start launch.sh from another current directory, in its own process group."""
        variables = {"PYTHON": str(self.python), "DDGAN_VENV": "", "CALLS": str(self.calls_file)} | variables
        return subprocess.Popen(
            [self.checkout / program, *arguments],
            cwd=self.elsewhere,
            env=environment(variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def launch(self, *arguments: str, program: str = "launch.sh", **variables: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of launch.sh."""
        process = self.start(*arguments, program=program, **variables)
        try:
            output, errors = process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output, errors

    def calls(self) -> list[str]:
        """The fake Python's calls since the last time this was called."""
        lines = self.calls_file.read_text().splitlines()
        self.calls_file.write_text("")
        return lines

    def installs(self) -> list[str]:
        """Like `calls`, with each pip call shortened to its distinguishing option."""
        return [next((option for option in INSTALLING if option in line), line) for line in self.calls()]


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
