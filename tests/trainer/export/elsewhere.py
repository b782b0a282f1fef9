"""Runs code in a process that cannot import this project."""

import subprocess
import sys
from pathlib import Path


def run_elsewhere(code: str, *arguments: str, folder: Path) -> str:
    """What the code prints, with `folder` as the working directory; nothing of the project is in its path."""
    line = [sys.executable, "-P", "-c", code, *arguments]
    env = {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
