"""Skipped updates are counted; a run that meets too many goes back, and ends with a diagnosis if that does not help."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from models.diffusion import Diffusion
from tests.trainer.engine.guard_rank import spoiled
from tests.trainer.runs import Recorder, Stopper, assert_same_state, configure, state_of, train
from trainer.algorithm.adversarial import STATISTICS, Adversarial
from trainer.algorithm.pairs import RawBatch
from trainer.config.sections import GuardConfig
from trainer.engine.guard import UpdateGuard
from trainer.engine.ranks import Ranks
from trainer.rank.divergence import Diverged, DivergenceError, LogitGap, SkippedUpdates
from trainer.worker import main

CPU = torch.device("cpu")


def arrange_failures(patch: pytest.MonkeyPatch, *steps: int, once: bool = False) -> list[int]:
    """Make the data of some steps, counted from 1, not a number: always, or only the first time a step is made.

    Returns:
        Where the steps that are made will stand.
    """
    draw, made = Adversarial.draw, []

    def failing(game: Adversarial, raw: RawBatch, diffusion: Diffusion) -> Any:
        batch, step = draw(game, raw, diffusion), raw.draws.step + 1
        if made[-1:] != [step]:
            made.append(step)
        return spoiled(batch, "nan") if step in steps and not (once and made.count(step) > 1) else batch

    patch.setattr(Adversarial, "draw", failing)
    return made


@pytest.fixture
def fail_at(monkeypatch) -> Callable[..., list[int]]:
    return partial(arrange_failures, monkeypatch)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> tuple[Path, Recorder]:
    """A run that continued after two bad steps."""
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        arrange_failures(patch, 2, 3)
        outcome, recorder = train(configure(tiny, directory))
    assert outcome.finished
    return directory, recorder


def manifest(directory: Path, step: int) -> dict[str, Any]:
    return json.loads((directory / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())


@pytest.mark.slow
def test_skipped_updates_are_counted_and_curves_and_state_stay_finite(whole):
    directory, recorder = whole
    for player in "gd":
        assert [recorder.metrics[step][f"skipped_updates_{player}"] for step in (4, 8, 10)] == [2, 0, 0]
    assert all(math.isfinite(value) for metrics in recorder.metrics.values() for value in metrics.values())
    assert 0 < recorder.metrics[4]["loss_g"] < 10
    assert all(torch.isfinite(tensor).all() for tensor in state_of(directory, 10).values())
    assert manifest(directory, 10)["updates"] == {"g": 8, "d": 8}


@pytest.mark.slow
def test_losses_of_an_interval_without_any_update_are_left_out(tiny, tmp_path, fail_at):
    fail_at(1, 2, 3, 4)
    _, recorder = train(configure(tiny, tmp_path, "training.total_images=128"))
    assert {"loss_g", "loss_d_real", "r1", "gradient_norm_g", "logit_real/t0"}.isdisjoint(recorder.metrics[4])
    assert recorder.metrics[4]["skipped_updates_g"] == 4
    assert all(map(math.isfinite, recorder.metrics[4].values()))
    assert recorder.metrics[8].keys() - recorder.metrics[4].keys() > {"loss_g", "r1", "gradient_norm_g"}


@pytest.mark.slow
def test_counts_and_rows_survive_a_stop(tiny, tmp_path, whole, fail_at):
    fail_at(2, 3)
    config = configure(tiny, tmp_path)
    _, before = train(config, Stopper(2))
    assert manifest(tmp_path, 2)["updates"] == {"g": 1, "d": 1}
    assert manifest(tmp_path, 2)["skipped_in_row"] == {"g": 1, "d": 1}
    _, after = train(config)
    assert_same_state(state_of(tmp_path, 10), state_of(whole[0], 10))
    curves = before.metrics | after.metrics
    assert {name: curves[4][name] for name in ("skipped_updates_d", "loss_g", "loss_d_real", "logit_fake/t0")} == {
        name: whole[1].metrics[4][name] for name in ("skipped_updates_d", "loss_g", "loss_d_real", "logit_fake/t0")
    }


@pytest.mark.slow
def test_a_fault_of_the_machine_is_undone_by_going_back(tiny, tmp_path, fail_at, caplog):
    more = ("checkpoint.save_interval_steps=4", "guard.max_skipped_in_row=3")
    train(configure(tiny, tmp_path / "straight", *more))
    made = fail_at(5, 6, 7, 8, once=True)
    outcome, recorder = train(configure(tiny, tmp_path / "failing", *more))
    assert outcome.finished
    assert made == [1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 9, 10]
    assert recorder.metrics[8]["skipped_updates_d"] == 0
    assert "Going back to step 4" in caplog.text
    assert_same_state(state_of(tmp_path / "failing", 10), state_of(tmp_path / "straight", 10))


@pytest.mark.slow
def test_what_comes_back_ends_the_run_with_a_diagnosis(tiny, tmp_path, fail_at, caplog, monkeypatch):
    status: list[str] = []
    monkeypatch.setattr(Recorder, "close", lambda _self, how: status.append(how))
    made = fail_at(*range(6, 11))
    more = ("checkpoint.save_interval_steps=4", "guard.max_skipped_in_row=3", "guard.max_rollbacks=2")
    with pytest.raises(DivergenceError) as caught:
        train(configure(tiny, tmp_path, *more))
    assert made == [1, 2, 3, 4] + [5, 6, 7, 8] * 3
    assert caplog.text.count("Going back to step 4") == 2
    assert status == ["FAILED"]
    text = str(caught.value)
    for player, rest in (("discriminator", "loss_d_real nan (rank 0)"), ("generator", "loss_g nan (rank 0)")):
        assert f"3 updates of the {player} in a row were skipped up to step 8. In step 6: gradient norm nan" in text
        assert rest in text
    assert "r1_penalty" not in text  # R1 is for steps 1, 3, 5 ...
    assert re.search(r"logits of real pairs not finite at t = \d", text)
    assert re.search(r"logits of generated pairs not finite at t = \d", text)
    assert "guard.max_rollbacks (2) is reached for the same steps" in text
    assert "step-00000004" in text
    assert "training.learning_rate_d.peak" in text


def test_without_a_checkpoint_it_ends_at_once(tiny, tmp_path, fail_at):
    made = fail_at(*range(1, 11))
    with pytest.raises(DivergenceError, match="there is no checkpoint to go back to"):
        train(configure(tiny, tmp_path, "guard.max_skipped_in_row=4"))
    assert made == [1, 2, 3, 4]


@pytest.fixture
def ranks():
    joined = Ranks.join("cpu", 60)
    yield joined
    joined.leave()


def follow(skipped: SkippedUpdates, *flags: float) -> None:
    for flag in flags:
        for player in ("d", "g"):
            guard = UpdateGuard(None, partitioned=False)
            guard.skipped = torch.tensor(flag)
            skipped.take_in(player, guard, {"loss_g": torch.tensor(1.0)})


def test_rollbacks_are_forgotten_once_the_run_is_past_the_steps(ranks):
    skipped = SkippedUpdates(GuardConfig(max_skipped_in_row=2, max_rollbacks=1), CPU, ("d", "g"), STATISTICS)
    for step in (10, 30):  # two faults, far apart
        follow(skipped, 0, 1, 1)
        with pytest.raises(Diverged) as caught:
            skipped.check(step, ranks)
        assert not caught.value.final
        skipped.load_rows({})
        follow(skipped, 0)
        skipped.check(step - 1, ranks)  # not past it yet
        assert skipped.num_rollbacks == 1
        skipped.check(step + 1, ranks)
        assert skipped.num_rollbacks == 0
    follow(skipped, 1, 1)
    with pytest.raises(Diverged):
        skipped.check(50, ranks)
    with pytest.raises(Diverged) as caught:
        skipped.check(50, ranks)
    assert caught.value.final


def test_null_never_goes_back(ranks):
    skipped = SkippedUpdates(GuardConfig(max_skipped_in_row=None), CPU, ("d", "g"), STATISTICS)
    follow(skipped, *[1.0] * 50)
    skipped.check(50, ranks)
    assert skipped.rows() == {"d": 50, "g": 50}


def test_a_row_that_has_ended_by_itself_is_left_alone(ranks):
    skipped = SkippedUpdates(GuardConfig(max_skipped_in_row=2), CPU, ("d", "g"), STATISTICS)
    follow(skipped, 1, 1, 1, 0)
    skipped.check(4, ranks)
    assert skipped.rows() == {"d": 0, "g": 0}


def test_command_ends_with_the_diagnosis_and_code_1(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the command would take the signals of the tests
    settings = [*tiny, f"run.directory={tmp_path}", "engine.backend=torch", "guard.max_gradient_norm=1e-9"]
    settings += ["guard.max_skipped_in_row=4"]
    assert main(["--config", "digits", *(x for s in settings for x in ("--set", s))]) == 1
    text = capsys.readouterr().err
    assert "Traceback" not in text
    assert "4 updates of the discriminator in a row were skipped up to step 4. In step 1: gradient norm" in text
    assert "more than guard.max_gradient_norm 1e-09; loss_d_real" in text
    assert "finite at every t: logits of real pairs, logits of fake pairs" in text


def warned(caplog: pytest.LogCaptureFixture, gaps: dict[int, float]) -> list[int]:
    """The steps named in warnings, if D's logits at the last of three timesteps differ by so much after these steps."""
    watch = LogitGap(num_steps=500, gap=0.1)
    for step, gap in gaps.items():
        real = {"logit_real/t0": 3.0, "logit_real/t1": 3.0, "logit_real/t2": 3.0 + gap}
        watch.check(step, real | {f"logit_fake/t{t}": 3.0 for t in range(3)})
    return [int(re.findall(r"first (\d+) steps", record.message)[0]) for record in caplog.records]


def test_logits_that_never_part_are_told_of_once(caplog):
    assert warned(caplog, dict.fromkeys(range(100, 2000, 100), 0.02)) == [500]


def test_logits_that_have_parted_at_one_timestep_may_meet_again(caplog):
    assert warned(caplog, {100: 0.02, 200: -0.3} | dict.fromkeys(range(300, 2000, 100), 0.0)) == []


def test_logits_of_a_resumed_run_are_not_judged(caplog):
    assert warned(caplog, dict.fromkeys(range(900, 2000, 100), 0.0)) == []


def test_training_without_a_discriminator_has_no_logits_to_judge(caplog):
    LogitGap(num_steps=1).check(1, {"loss_g": 1.0})
    assert not caplog.records
