"""The linter accepts jaxtyping's shapes and still finds undefined names."""

import subprocess
import sys

from tests.launch import ROOT

SHAPES = """
from jaxtyping import Float
from torch import Tensor


def mean(x: Float[Tensor, "b c"], weights: Float[Tensor, " b"]) -> "Float[Tensor, ' c']":
    return (weights[:, None] * x).mean(dim=0)
"""


def found_by_ruff(text: str, file: str) -> list[str]:
    """Rules broken by a module with this text in place of `file`, under the project's settings."""
    command = [sys.executable, "-m", "ruff", "check", "--ignore=D", "--output-format=concise"]
    done = subprocess.run(
        [*command, f"--stdin-filename={file}", "-"], input=text, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith(file)]


def test_shapes_are_no_undefined_names():
    assert found_by_ruff(SHAPES, "models/example.py") == []


def test_an_undefined_name_is_found_in_code_and_in_tests():
    for file in ("models/example.py", "trainer/algorithm/example.py", "tests/models/test_example.py"):
        assert found_by_ruff(SHAPES.replace("weights[", "wieghts["), file) == ["F821 Undefined name `wieghts`"]
        assert found_by_ruff(SHAPES.replace('"b c"', "Shape"), file) == ["F821 Undefined name `Shape`"]
