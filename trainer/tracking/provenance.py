"""The origin of a result: commit, library versions and data, as tags of its run."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

LIBRARIES = ("torch", "deepspeed", "ray", "webdataset", "mlflow", "ddgan")


def collect_tags(index_digest: str, *, source: Path = Path(__file__).parent) -> dict[str, str]:
    """Tags of a run.

    Args:
        index_digest: digest of the data set, the same for both versions of its format; see `ShardIndex.digest`.
        source: folder of the code, in its git checkout if it has one.
    """
    # A submitted job comes without its .git folder; the submitter can supply the commit.
    commit = _git(source, "rev-parse", "HEAD") or os.environ.get("DDGAN_GIT_COMMIT")
    changes = _git(source, "status", "--porcelain", "--untracked-files=no")
    tags = {
        "git_commit": commit or "unknown",
        "git_dirty": "unknown" if commit is None or changes is None else str(bool(changes)).lower(),
        "index_sha256": index_digest,
        "version.python": platform.python_version(),
    }
    if commit:
        tags["mlflow.source.git.commit"] = commit  # fills MLflow's own column
    return tags | {f"version.{library}": version for library, version in library_versions().items()}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that affect results."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return versions


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None if git, a checkout or an answer is missing."""
    try:
        done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
