"""Runs the schedulers' programs, such as sbatch, ray and kubectl."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.storage.errors import OperationError
from data.storage.redaction import redact


class ToolError(OperationError):
    """A scheduler's program is missing or failed; the message quotes its output, or says what to do."""


def run_tool(command: Sequence[str], *, stdin: str | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a program and return its output.

    Raises:
        ToolError: the program is missing, or it failed.
    """
    # Without `stdin` the input is empty, so the program never reads this terminal.
    done = subprocess.run(
        [_found(command[0]), *command[1:]], input=stdin or "", capture_output=True, text=True, env=env
    )
    if done.returncode:
        raise ToolError(redact(f"{shlex.join(command)} failed: {(done.stderr or done.stdout).strip()}"))
    return done.stdout.strip()


def show_tool(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> int:
    """Run a program whose output goes to the user; returns its exit code.

    Raises:
        ToolError: the program is missing.
    """
    return subprocess.run([_found(command[0]), *command[1:]], env=env, stdin=subprocess.DEVNULL).returncode


def _found(program: str) -> str:
    in_environment = Path(sys.executable).with_name(program)  # ray is installed next to this Python
    found = str(in_environment) if in_environment.is_file() else shutil.which(program)
    if found is None:
        raise ToolError(f"there is no {program} on this machine: run this command where the scheduler's programs are")
    return found
