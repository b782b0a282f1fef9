"""What importing the project's packages does: it finds those of this project, and makes later imports faster."""

import os
import subprocess
import sys

import pytest

from tests.launch import ROOT, environment, run_python


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


@pytest.mark.parametrize(("before", "after"), [(700, 5_000), (9_000, 9_000), (0, 0)])
@pytest.mark.parametrize("package", ["data", "trainer"])
def test_the_threshold_of_the_garbage_collector_is_raised_and_never_lowered(package, before, after):
    code = f"import gc; gc.set_threshold({before}); import {package}; print(gc.get_threshold()[0])"
    assert run_python(["-c", code]).stdout == f"{after}\n"
