"""The same global batch on 1, 2, 3 and 4 ranks: the same draws, the same losses, and one state that all of them share.

16 images of four deviation groups: 3 ranks take 8, 4 and 4 of them, so two ranks fill up a forward pass.

    python -m pytest tests/integration/test_world_sizes.py -s        # prints the differences
    python -m tests.integration.test_world_sizes                     # prints the drift with Adam's usual eps, 1e-8
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from data.prepare import command as prepare
from tests.conftest import TINY
from tests.integration.world_sizes_rank import MOVES, NUM_STEPS, STAGES
from tests.launch import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.multirank]

WORLD_SIZES = (1, 2, 3, 4)
DRIFT_STEPS = 50
"""Of the command; docs/resuming.md gives what it prints."""
SETTINGS = (
    f"training.total_images={16 * NUM_STEPS}",
    "tracking.log_interval_steps=1",
    "generator.channel_multipliers=[1]",
    "generator.attention_resolutions=[]",
    "generator.dropout=0.1",
    # The default, which are the authors'. Those of the digits, 0 and 0.99, amplify rounding a hundred times more.
    "training.adam.beta1=0.5",
    "training.adam.beta2=0.9",
)
Losses = dict[str, list[float]]


def run_worlds(folder: Path, *arguments: str) -> dict[int, dict]:
    """What each number of ranks has to say, in one folder, one after the other."""
    found = {}
    for world_size in WORLD_SIZES:
        done = run_ranks(world_size, ["-m", "tests.integration.world_sizes_rank", str(folder), *arguments])
        assert done.returncode == 0, done.stderr[-4000:]
        found[world_size] = json.loads((folder / f"world-{world_size}.json").read_text())
    return found


@pytest.fixture(scope="module")
def worlds(tiny: Sequence[str], tmp_path_factory) -> dict[int, dict]:
    return run_worlds(tmp_path_factory.mktemp("worlds"), *tiny, *SETTINGS)


def largest_difference(left: Losses, right: Losses) -> float:
    """Relative, over all steps and losses of two curves."""
    assert len(left) in (NUM_STEPS, DRIFT_STEPS)
    assert left.keys() == right.keys() == {str(step) for step in range(1, len(left) + 1)}
    return max(abs(a / b - 1) for step in left for a, b in zip(left[step], right[step], strict=True))


def differences(worlds: dict[int, dict], case: str) -> dict[int, float]:
    """Of each number of ranks from one rank, printed for docs/experiments.md."""
    curves = {n: found[case]["losses"] for n, found in worlds.items() if case in found}
    found = {n: largest_difference(curve, curves[1]) for n, curve in curves.items() if n > 1}
    print(case, {n: f"{value:.1e}" for n, value in found.items()})  # noqa: T201
    return found


@pytest.mark.parametrize("case", ["fp32", "fp64"])
def test_every_sample_draws_the_same_bit_for_bit(worlds, case):
    drawn = {n: found[case]["draws"] for n, found in worlds.items() if case in found}
    assert list(drawn) == [n for n in WORLD_SIZES if n != 3 or case == "fp64"]
    assert drawn[1].keys() == {str(step) for step in range(NUM_STEPS)}
    assert all(len(set(lines)) == len(lines) == 16 for lines in drawn[1].values())
    assert all(draws == drawn[1] for draws in drawn.values())


def test_losses_agree_in_float32(worlds):
    assert max(differences(worlds, "fp32").values()) < 1e-5  # Adam with eps 1e-4: sums in another order


def test_losses_agree_in_float64(worlds):
    assert max(differences(worlds, "fp64").values()) < 1e-9


def test_a_run_that_changes_ranks_and_stages_continues_as_the_unchanged_one(worlds):
    joined = {step: losses for n in MOVES for step, losses in worlds[n]["moved"]["losses"].items()}
    found = largest_difference(joined, worlds[1]["fp32"]["losses"])
    print("moved", f"{found:.1e}")  # noqa: T201
    assert found < 1e-5
    draws = {step: lines for n in MOVES for step, lines in worlds[n]["moved"]["draws"].items()}
    assert draws == worlds[1]["fp32"]["draws"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_state_passes_through_every_stage_without_loss(worlds, world_size):
    assert worlds[world_size]["different"] == {f"{g}/{d}": [] for g, d in STAGES}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "digits"
        if prepare.main(["digits", "--out", str(data), "--size", "8", "--workers", "1"]):
            sys.exit(1)
        sets = (*TINY, f"data.path={data}", *SETTINGS, f"training.total_images={16 * DRIFT_STEPS}")
        differences(run_worlds(Path(scratch), "--usual-eps", *sets), "usual eps")
