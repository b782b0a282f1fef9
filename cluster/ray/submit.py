"""Makes a Ray job from a request, for `./launch.sh ray`; submits it, follows it and stops it."""

import json
import os
import shlex
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.commands import ToolError, run_tool, show_tool
from cluster.record import Record, last_of
from cluster.request import ROOT, Request
from trainer.tracking.provenance import collect_tags

RUNTIME_ENV = Path(__file__).parent / "runtime_env.yaml"
TOKEN_FILE = Path("~/.ray/auth_token")
_OVER = ("SUCCEEDED", "FAILED", "STOPPED")
_STATES = {
    "SUCCEEDED": "' succeeded",
    "FAILED": "' failed",
    "STOPPED": "' was stopped",
    "PENDING": ": PENDING",
    "RUNNING": ": RUNNING",
}
"""What `ray job status` prints for each state."""


def runtime_env(commit: str | None) -> dict[str, Any]:
    """The job's runtime environment.

    Args:
        commit: commit of the checkout, which is uploaded without its .git; None: unknown.
    """
    found = yaml.safe_load(RUNTIME_ENV.read_text())
    if commit:
        found["env_vars"]["DDGAN_GIT_COMMIT"] = commit
    return found


def command(request: Request, address: str) -> list[str]:
    """The command that submits the job, under a unique submission id."""
    commit = collect_tags("")["git_commit"]
    environment = runtime_env(None if commit == "unknown" else commit)
    name = f"{request.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    return [
        *["ray", "job", "submit", "--address", address, "--submission-id", name, "--no-wait"],
        *["--working-dir", str(ROOT), "--runtime-env-json", json.dumps(environment), "--"],
        *shlex.split(request.entrypoint),
    ]


def submit(request: Request, address: str, line: Sequence[str]) -> Record:
    """Submit the job to the cluster.

    Raises:
        ToolError: there is no token, the cluster refuses, or the run is still active there.
    """
    env = client_environment()
    before = last_of(request.name)
    if before and before.way == "ray" and before.place == address:
        state = _state(before, env)
        if state and state not in _OVER:
            raise ToolError(
                f"{request.name} is still active as job {before.job} ({state}): stop it with ./launch.sh stop "
                f"{request.name}"
            )
    run_tool(line, env=env)
    name = line[line.index("--submission-id") + 1]
    return Record(request.name, "ray", request.config.run.directory, name, place=address)


def client_environment() -> dict[str, str]:
    """The environment of Ray's clients, with a token.

    Raises:
        ToolError: there is no token.
    """
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not given and not TOKEN_FILE.expanduser().is_file():
        raise ToolError(
            f"there is no token for the cluster: put it into {TOKEN_FILE} (mode 600), or name another file in "
            "RAY_AUTH_TOKEN_PATH. A cluster without a token runs anybody's code: see docs/security.md"
        )
    return dict(os.environ) | {"RAY_AUTH_MODE": "token"}


def is_open(address: str) -> bool:
    """Whether the cluster accepts jobs without a token."""
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=10).close()
    except (OSError, ValueError):
        return False
    return True


def status(record: Record) -> int:
    """Show the job's status."""
    return show_tool(["ray", "job", "status", "--address", record.place, record.job], env=client_environment())


def logs(record: Record, follow: bool) -> int:
    """Show the driver's output."""
    more = ["--follow"] if follow else []
    return show_tool(["ray", "job", "logs", "--address", record.place, *more, record.job], env=client_environment())


def stop(record: Record) -> int:
    """Save and exit: send SIGTERM to the driver, and wait for the job."""
    return show_tool(["ray", "job", "stop", "--address", record.place, record.job], env=client_environment())


def _state(record: Record, env: dict[str, str]) -> str:
    """The state of a job according to the cluster; empty if the cluster no longer knows it."""
    try:
        printed = run_tool(["ray", "job", "status", "--address", record.place, record.job], env=env)
    except ToolError as error:
        if "does not exist" in str(error) or "404" in str(error):
            return ""
        raise
    return next((state for state, text in _STATES.items() if text in printed), "")
