"""The kernels are built for a GPU, although no GPU is needed for that."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.launch import ROOT


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_every_kernel_is_built_for_an_h100_without_atomics_and_moves_16_bytes_at_a_time(tmp_path) -> None:
    # Another process: in this one, kernels are interpreted.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.models.fused.kernels.builds"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 13
    for line in lines:
        assert line.endswith("atomics: 0")
        merges = line.startswith("merged")  # of the few partial results of one group
        assert merges or "wide accesses: 0" not in line, line
