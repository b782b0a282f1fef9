"""SIGKILL in each phase of a save leaves a valid checkpoint, from which the run resumes as if nothing had happened."""

import pytest

from tests.launch import run_python
from tests.trainer.checkpoint.killed_saves import PHASES

SEEDS = 2


@pytest.mark.slow
def test_kill_in_any_phase_of_a_save_costs_no_checkpoint_and_changes_no_weight(tiny, tmp_path):
    done = run_python(["-m", "tests.trainer.checkpoint.killed_saves", str(tmp_path), "0", str(SEEDS), *tiny])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for phase in PHASES:
        assert done.stdout.count(f"{phase}, seed ") == SEEDS
