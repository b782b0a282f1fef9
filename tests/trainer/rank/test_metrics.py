"""Curves are means over steps and ranks; the times of a step add up."""

import time

import pytest
import torch

from trainer.config.sections import GuardConfig
from trainer.engine.guard import UpdateGuard
from trainer.engine.ranks import Ranks
from trainer.rank.divergence import SkippedUpdates
from trainer.rank.metrics import StatisticsSum, StepClock, peak_memory_gib

CPU = torch.device("cpu")


@pytest.fixture
def ranks():
    joined = Ranks.join("cpu", 60)
    yield joined
    joined.leave()


def statistics(loss: float, r1: float | None = None) -> dict[str, torch.Tensor]:
    found = {name: torch.tensor(loss) for name in ("loss_d_real", "loss_d_fake", "loss_g")}
    found |= {"logits_real": torch.tensor([1.0, 3.0]), "logits_fake": torch.tensor([-1.0, 0.0])}
    found["frequency_t"] = torch.tensor([0.25, 0.75])
    if r1 is not None:
        found |= {"r1_penalty": torch.tensor(r1), "r1_steps": torch.tensor(1.0)}
    return found


def test_losses_are_means_over_steps_and_r1_over_the_steps_that_have_it(ranks):
    sums = StatisticsSum()
    for loss, r1 in ((1.0, 6.0), (2.0, None), (6.0, 8.0)):
        sums.add(statistics(loss, r1))
    means = sums.take(ranks)
    assert means["loss_g"] == pytest.approx(3.0)
    assert means["r1"] == pytest.approx(7.0)
    assert means["logit_real/t0"] == pytest.approx(4.0)
    assert means["logit_real/t1"] == pytest.approx(4.0)
    assert sums.state() == {}


def test_means_are_over_the_updates_that_were_made(ranks):
    sums = StatisticsSum()
    made, nothing = statistics(4.0), {name: torch.zeros_like(value) for name, value in statistics(4.0).items()}
    for g, d in ((made, made), (made, nothing), (made, nothing), (nothing, made)):
        sums.add({name: value for name, value in d.items() if name != "loss_g"} | {"loss_g": g["loss_g"]})
        sums.add({f"skipped_updates_{p}": torch.tensor(float(x is nothing)) for p, x in (("g", g), ("d", d))})
    means = sums.take(ranks)
    assert means["loss_g"] == means["loss_d_real"] == pytest.approx(4.0)
    assert (means["skipped_updates_g"], means["skipped_updates_d"]) == (1, 2)


def test_sums_of_two_ranks_mean_the_same_on_one(ranks):
    """A run that goes on with another number of ranks adds up what each of the former had."""
    guard = UpdateGuard(None, partitioned=False)
    total: dict[str, torch.Tensor] = {}
    for rank_loss in (1.0, 2.0):
        sums, skipped = StatisticsSum(), SkippedUpdates(GuardConfig(), CPU, world_size=2)
        for bad in (False, True, False):
            guard.skipped = torch.tensor(float(bad))
            share = {name: 0.5 * value for name, value in statistics(rank_loss).items()}
            of_g = {"loss_g": share.pop("loss_g")}
            sums.add(skipped.take_in("d", guard, share))
            sums.add(skipped.take_in("g", guard, of_g))
        for name, value in sums.state().items():
            total[name] = total[name] + value if name in total else value
    one = StatisticsSum()
    one.load(total, CPU)
    means = one.take(ranks)
    assert (means["skipped_updates_d"], means["skipped_updates_g"]) == (1, 1)
    assert means["loss_g"] == means["loss_d_fake"] == pytest.approx(1.5)


def test_a_loss_that_does_not_fall_into_two_and_r2_are_averaged_alike(ranks):
    sums = StatisticsSum()
    for loss, r2 in ((1.0, 5.0), (3.0, None)):
        found = {k: v for k, v in statistics(loss).items() if k not in ("loss_d_real", "loss_d_fake")}
        found["loss_d"] = torch.tensor(loss)
        if r2 is not None:
            found |= {"r2_penalty": torch.tensor(r2), "r2_steps": torch.tensor(1.0)}
        sums.add(found)
    means = sums.take(ranks)
    assert (means["loss_d"], means["r2"]) == (2.0, 5.0)
    assert not {"loss_d_real", "r1"} & means.keys()


def test_a_timestep_that_never_came_up_has_no_point(ranks):
    sums = StatisticsSum()
    found = statistics(1.0)
    found |= {"frequency_t": torch.tensor([1.0, 0.0]), "logits_real": torch.tensor([2.0, 0.0])}
    sums.add(found)
    means = sums.take(ranks)
    assert means["logit_real/t0"] == 2.0
    assert "logit_real/t1" not in means


def test_saved_sums_go_on_where_they_were(ranks):
    first, second = StatisticsSum(), StatisticsSum()
    first.add(statistics(1.0))
    second.load(first.state(), CPU)
    second.add(statistics(3.0))
    assert second.take(ranks)["loss_d_real"] == pytest.approx(2.0)


def test_replaced_samples_are_summed_and_survive_a_checkpoint(ranks):
    first, second = StatisticsSum(), StatisticsSum()
    first.add(statistics(1.0))
    first.count_replaced(3)
    second.load(first.state(), CPU)
    second.add(statistics(1.0))
    second.count_replaced(2)
    assert second.take(ranks)["replaced_samples"] == 5
    second.add(statistics(1.0))
    assert second.take(ranks)["replaced_samples"] == 0


def test_parts_of_the_steps_add_up_to_their_time():
    clock = StepClock(CPU)
    for _ in range(2):
        time.sleep(0.01)
        clock.mark("data")
        time.sleep(0.02)
        clock.end_step("d")
    wall, split, steps = clock.take()
    assert steps == 2
    assert split["data"] >= 0.02
    assert split["d"] >= 0.04
    assert sum(split.values()) == pytest.approx(wall, rel=0.05)
    assert clock.take()[2] == 0


def test_peak_memory_of_this_process_is_of_its_order():
    assert 0.05 < peak_memory_gib(CPU) < 100
