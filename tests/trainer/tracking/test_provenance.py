import platform
import subprocess
from pathlib import Path

import torch

from trainer.tracking.provenance import collect_tags


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_tags_name_commit_libraries_and_data(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "message")
    tags = collect_tags("digest", source=tmp_path)
    assert tags["git_commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert tags["git_dirty"] == "false"
    assert tags["index_sha256"] == "digest"
    assert tags["version.torch"] == torch.__version__
    assert tags["version.python"] == platform.python_version()
    assert {f"version.{name}" for name in ("deepspeed", "ray", "webdataset", "mlflow")} <= tags.keys()


def test_changed_file_makes_the_commit_dirty(tmp_path: Path) -> None:
    test_tags_name_commit_libraries_and_data(tmp_path)
    (tmp_path / "file").write_text("2")
    assert collect_tags("digest", source=tmp_path)["git_dirty"] == "true"


def test_code_without_a_checkout_has_an_unknown_commit(tmp_path: Path) -> None:
    tags = collect_tags("digest", source=tmp_path)
    assert (tags["git_commit"], tags["git_dirty"]) == ("unknown", "unknown")
