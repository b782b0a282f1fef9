"""Starts the real processes that tests need."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: this checkout importable, one thread, no rank of a surrounding group."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(extra or {})}


def run_python(
    arguments: Sequence[str],
    *,
    cwd: Path = ROOT,
    timeout_s: float = 300,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` to its end, with its output as text."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment(env), capture_output=True, text=True, timeout=timeout_s
    )


def run_ranks(num_ranks: int, arguments: Sequence[str], *, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """`torchrun ARGUMENTS` with real processes that talk over gloo."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return run_python([*torchrun, *arguments], timeout_s=timeout_s)
