"""The adaptive probability of augmentation on 1, 2 and 3 ranks: the same bits on each and after a change."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.launch import run_ranks
from tests.trainer.runs import state_of

pytestmark = [pytest.mark.slow, pytest.mark.multirank]

SETTINGS = (
    "engine.backend=torch",
    "training.objective=relativistic",
    "training.augmentation.adaptive.target=0.01",
    "training.augmentation.adaptive.images=1024",
    "training.adam.eps=1e-4",  # the usual one amplifies the rounding of sums in another order
    "training.micro_batch_size=4",
    "training.learning_rate_g.decay=constant",  # independent of the length of a run
    "training.learning_rate_d.decay=constant",
    "checkpoint.save_interval_steps=5",
    "checkpoint.keep_last=10",
)
"""16 images a step: the probability changes by a sixteenth at every fourth step; a checkpoint lies between."""


def train(tiny: Sequence[str], folder: Path, world_size: int, *more: str) -> None:
    sets = [*tiny, *SETTINGS, f"scaling.world_size={world_size}", f"run.directory={folder}", *more]
    arguments = [word for override in sets for word in ("--set", override)]
    done = run_ranks(world_size, ["-m", "trainer.worker", "--config", "digits", *arguments])
    assert done.returncode == 0, done.stderr[-3000:]


def states(folder: Path, step: int) -> list[tuple[float, int]]:
    """Probability and counted signs of each rank."""
    saved = state_of(folder, step)
    ranks = sorted({key.split("/")[0] for key in saved})
    found = [tuple(saved[f"{rank}/extra/augmentation/{name}"] for name in ("probability", "signs")) for rank in ranks]
    assert all((p.dtype, signs.dtype) == (torch.float64, torch.int64) for p, signs in found)
    return [(p.item(), int(signs)) for p, signs in found]


def test_the_probability_is_the_same_on_any_number_of_ranks_and_where_it_changes(tiny, tmp_path):
    for world_size in (1, 2, 3):
        train(tiny, tmp_path / f"{world_size}", world_size)
    for step in (5, 10):
        (alone,) = states(tmp_path / "1", step)
        assert states(tmp_path / "2", step) == [alone] * 2
        assert states(tmp_path / "3", step) == [alone] * 3
    assert states(tmp_path / "1", 10)[0][0] in (0.0625, 0.125)
    assert states(tmp_path / "1", 10)[0][1] != 0
    train(tiny, tmp_path / "moved", 2, "training.total_images=80")
    train(tiny, tmp_path / "moved", 3)
    assert states(tmp_path / "moved", 10) == states(tmp_path / "3", 10)
