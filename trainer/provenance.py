"""What a result was made by: the commit, the libraries and the data, as tags of its run."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

LIBRARIES = ("torch", "deepspeed", "ray", "webdataset", "mlflow")


def collect_tags(index_digest: str, *, source: Path = Path(__file__).parent) -> dict[str, str]:
    """Tags of a run.

    Args:
        index_digest: SHA-256 of the data set's index.json, which names every shard with its own digest.
        source: folder of the code, in its git checkout if it has one.
    """
    commit = _git(source, "rev-parse", "HEAD")
    changes = _git(source, "status", "--porcelain", "--untracked-files=no")
    tags = {
        "git_commit": commit or "unknown",
        "git_dirty": "unknown" if commit is None or changes is None else str(bool(changes)).lower(),
        "index_sha256": index_digest,
        "version.python": platform.python_version(),
    }
    if commit:
        tags["mlflow.source.git.commit"] = commit  # MLflow's own column for it
    for library in LIBRARIES:
        try:
            tags[f"version.{library}"] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            tags[f"version.{library}"] = "not installed"
    return tags


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None where there is no git, no checkout, or no answer."""
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
