"""The programs of the schedulers: sbatch, ray, kubectl and their like."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.storage.errors import OperationError
from data.storage.redaction import redact


class ToolError(OperationError):
    """A scheduler's program is not there or refuses; says what it said, and what to do."""


def run_tool(command: Sequence[str], *, stdin: str | None = None, env: Mapping[str, str] | None = None) -> str:
    """Its output.

    Raises:
        ToolError: it is not there, or it ended with an error.
    """
    # An empty input, not this terminal's, where none is given.
    done = subprocess.run(
        [_found(command[0]), *command[1:]], input=stdin or "", capture_output=True, text=True, env=env
    )
    if done.returncode:
        raise ToolError(redact(f"{shlex.join(command)} failed: {(done.stderr or done.stdout).strip()}"))
    return done.stdout.strip()


def show_tool(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> int:
    """Run it before the user's eyes; its exit code.

    Raises:
        ToolError: it is not there.
    """
    return subprocess.run([_found(command[0]), *command[1:]], env=env, stdin=subprocess.DEVNULL).returncode


def _found(program: str) -> str:
    beside = Path(sys.executable).with_name(program)  # ray, in the environment of this Python
    found = str(beside) if beside.is_file() else shutil.which(program)
    if found is None:
        raise ToolError(f"there is no {program} on this machine: give the command where the scheduler's programs are")
    return found
