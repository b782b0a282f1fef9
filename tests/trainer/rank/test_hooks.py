"""When hooks are due, in which order they run, and what they are told."""

import errno
import math

import pytest
import torch

from tests.trainer.runs import Stopper, configure, train
from trainer.config.stages import only_stage
from trainer.engine.ranks import Ranks
from trainer.rank import hooks
from trainer.rank.build import build
from trainer.rank.hooks import Curves, DrawGrid, Evaluate, LogCurves, SaveCheckpoint, machine_curves
from trainer.rank.loop import Loop, Share
from trainer.rank.watchdog import Phase, Watchdog

NOTHING = None
"""For collaborators that `due` does not ask."""


def due_steps(hook, *, last: int = 10, batch: int = 16) -> list[int]:
    return [step for step in range(1, last + 1) if hook.due(step, step * batch, step == last)]


def test_curves_are_logged_at_the_interval_and_at_the_end():
    assert due_steps(LogCurves(4, *[NOTHING] * 6)) == [4, 8, 10]  # pyright: ignore[reportArgumentType]


def test_slowest_rank_is_named_beside_the_mean_and_each_node_has_its_curves():
    host, none, gpu = [50.0, 2.0, 9.0], [math.nan] * 3, [99.0, 70.0, 600.0, 55.0]
    rows = torch.tensor([[1.0, *host, *gpu], [4.0, *none, *gpu], [1.0, *host, *gpu]], dtype=torch.float64)
    curves = machine_curves(rows)
    assert [curves[f"step_time_{name}"] for name in ("s", "slowest_s", "slowest_rank")] == [2.0, 4.0, 1.0]
    assert curves["system/node-0/gpu-1/power_watts"] == 600.0 and curves["system/node-1/cpu_percent"] == 50.0
    assert "system/node-1/gpu-1/power_watts" not in curves and len(curves) == 3 + 2 * 3 + 3 * 4


@pytest.mark.parametrize(("interval", "steps"), [("3", [3, 6, 9, 10]), ("null", [10])])
def test_grids_are_drawn_at_the_interval_and_at_the_end(tiny, tmp_path, interval, steps):
    config = configure(tiny, tmp_path, f"grids.interval_steps={interval}")
    assert due_steps(DrawGrid(config, NOTHING, NOTHING, ())) == steps  # pyright: ignore[reportArgumentType]


def test_evaluations_come_after_so_many_images_whatever_the_batch(tiny, tmp_path):
    config = configure(tiny, tmp_path, "evaluation.interval_images=40", "data.num_classes=10")
    hook = Evaluate(config, *[NOTHING] * 4)  # pyright: ignore[reportArgumentType]
    assert due_steps(hook) == [3, 5, 8, 10]  # past 40, 80, 120, 160 images


@pytest.mark.parametrize(("interval", "steps"), [(5, [5]), (3, [3, 6, 9]), (None, [])])
def test_the_end_is_saved_by_the_worker_and_not_by_the_hook(interval, steps):
    assert due_steps(SaveCheckpoint(interval, *[NOTHING] * 5)) == steps  # pyright: ignore[reportArgumentType]


def test_figures_belong_to_the_weights_of_their_step_alone():
    curves = Curves({"loss_g": 1.0, "fid": 9.0})
    assert curves.after(4) == {"loss_g": 1.0}
    curves.note_figures(4, {"fid": 5.0})
    assert curves.after(4) == {"loss_g": 1.0, "fid": 5.0}
    assert curves.after(5) == {"loss_g": 1.0}


class Noting:
    """A hook that is due at some steps and keeps what it was told."""

    def __init__(self, phase: Phase, steps: set[int], seen: list[tuple]) -> None:
        self.phase: Phase = phase
        self.steps, self.seen = steps, seen

    def due(self, step: int, images: int, at_end: bool) -> bool:
        if at_end:
            self.seen.append((self.phase, "end"))
        return step in self.steps

    def run(self, loop: Loop) -> None:
        self.seen.append((self.phase, loop.step, loop.images, loop.watchdog.standing()[0]))


def test_hooks_run_in_order_after_the_steps_at_which_they_are_due(tiny, tmp_path):
    config, seen = configure(tiny, tmp_path, "training.total_images=48"), []
    ranks = Ranks.join("cpu", 60)
    try:
        loop = Loop(
            stage=only_stage(config),
            ranks=ranks,
            share=Share.of(config, 0, 1),
            learner=build(config, ranks),
            batches=iter(()),
            driver=Stopper(),
            hooks=[Noting("log", {1, 3}, seen), Noting("checkpoint", {1}, seen)],
            watchdog=Watchdog(None),
        )
        loop._one_step = lambda: setattr(loop, "step", loop.step + 1)  # pyright: ignore[reportAttributeAccessIssue]
        assert loop.run(last=2)
        assert seen == [("log", 1, 16, "log"), ("checkpoint", 1, 16, "checkpoint")]
        seen.clear()
        assert loop.run()
        assert seen == [("log", "end"), ("log", 3, 48, "log"), ("checkpoint", "end")]
    finally:
        ranks.leave()


def test_a_grid_that_cannot_be_written_is_told_and_training_continues(tiny, tmp_path, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hooks, "save_grid", full)
    _, recorder = train(configure(tiny, tmp_path, "grids.interval_steps=5"))
    assert max(recorder.metrics) == 10
    told = [record.getMessage() for record in caplog.records if "grid" in record.getMessage()]
    assert [text.partition(" was not saved")[0] for text in told] == ["the grid of step 5", "the grid of step 10"]
