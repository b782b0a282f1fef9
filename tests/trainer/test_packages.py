"""The project's packages have common names; those of the current folder are not taken for them."""

import os
import subprocess
import sys

from tests.launch import ROOT, environment


def test_packages_of_the_current_folder_are_not_taken_for_ours(tmp_path):
    (tmp_path / "data.py").write_text("x = 1")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    code = "import cluster, data, models; print(*(module.__file__ for module in (cluster, data, models)))"
    for first in ("trainer", "cluster"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {first}; {code}"],
            cwd=tmp_path,
            env=environment({"PYTHONPATH": os.fspath(ROOT)}),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [str(ROOT / name / "__init__.py") for name in ("cluster", "data", "models")]
