"""Curves are means over steps and ranks; the times of a step add up."""

import math
import time

import pytest
import torch

from trainer.algorithm.adversarial import STATISTICS
from trainer.algorithm.statistics import total
from trainer.config.sections import GuardConfig
from trainer.engine.guard import UpdateGuard
from trainer.engine.ranks import Ranks
from trainer.rank.divergence import SkippedUpdates
from trainer.rank.metrics import StatisticsSum, StepClock, peak_memory_gib

CPU = torch.device("cpu")
DECLARED = (*STATISTICS, total("skipped_updates_d"), total("skipped_updates_g"))
OF_G = ("loss_g", "updates_g")
"""Statistics of G's updates; the others here are of D's."""


@pytest.fixture
def ranks():
    joined = Ranks.join("cpu", 60)
    yield joined
    joined.leave()


def statistics(loss: float, r1: float | None = None) -> dict[str, torch.Tensor]:
    found = {name: torch.tensor(loss) for name in ("loss_d_real", "loss_d_fake", "loss_g")}
    found |= {"logits_real": torch.tensor([1.0, 3.0]), "logits_fake": torch.tensor([-1.0, 0.0])}
    found |= {"frequency_t": torch.tensor([0.25, 0.75]), "updates_g": torch.tensor(1.0)}
    if r1 is not None:
        found |= {"r1_penalty": torch.tensor(r1), "r1_steps": torch.tensor(1.0)}
    return found


def test_losses_are_means_over_steps_and_r1_over_the_steps_that_have_it(ranks):
    sums = StatisticsSum(DECLARED)
    for loss, r1 in ((1.0, 6.0), (2.0, None), (6.0, 8.0)):
        sums.add(statistics(loss, r1))
    means = sums.take(ranks)
    assert means["loss_g"] == pytest.approx(3.0)
    assert means["r1"] == pytest.approx(7.0)
    assert means["logit_real/t0"] == pytest.approx(4.0)
    assert means["logit_real/t1"] == pytest.approx(4.0)
    assert sums.state() == {}


def test_means_are_over_the_updates_that_were_made(ranks):
    sums = StatisticsSum(DECLARED)
    made, nothing = statistics(4.0), {name: torch.zeros_like(value) for name, value in statistics(4.0).items()}
    for g, d in ((made, made), (made, nothing), (made, nothing), (nothing, made)):
        sums.add({name: value for name, value in d.items() if name not in OF_G} | {name: g[name] for name in OF_G})
        sums.add({f"skipped_updates_{p}": torch.tensor(float(x is nothing)) for p, x in (("g", g), ("d", d))})
    means = sums.take(ranks)
    assert means["loss_g"] == means["loss_d_real"] == pytest.approx(4.0)
    assert (means["skipped_updates_g"], means["skipped_updates_d"]) == (1, 2)


def test_sums_of_two_ranks_mean_the_same_on_one(ranks):
    """A run that resumes with another number of ranks adds up what each of the former had."""
    guard = UpdateGuard(None, partitioned=False)
    everyone: dict[str, torch.Tensor] = {}
    for rank_loss in (1.0, 2.0):
        sums, skipped = (
            StatisticsSum(DECLARED),
            SkippedUpdates(GuardConfig(), CPU, ("d", "g"), STATISTICS, world_size=2),
        )
        for bad in (False, True, False):
            guard.skipped = torch.tensor(float(bad))
            share = {name: 0.5 * value for name, value in statistics(rank_loss).items()}
            of_g = {name: share.pop(name) for name in OF_G}
            sums.add(skipped.take_in("d", guard, share))
            sums.add(skipped.take_in("g", guard, of_g))
        for name, value in sums.state().items():
            everyone[name] = everyone[name] + value if name in everyone else value
    one = StatisticsSum(DECLARED)
    one.load(everyone, CPU)
    means = one.take(ranks)
    assert (means["skipped_updates_d"], means["skipped_updates_g"]) == (1, 1)
    assert means["loss_g"] == means["loss_d_fake"] == pytest.approx(1.5)


def test_a_loss_that_does_not_fall_into_two_and_r2_are_averaged_alike(ranks):
    sums = StatisticsSum(DECLARED)
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
    sums = StatisticsSum(DECLARED)
    found = statistics(1.0)
    found |= {"frequency_t": torch.tensor([1.0, 0.0]), "logits_real": torch.tensor([2.0, 0.0])}
    sums.add(found)
    means = sums.take(ranks)
    assert means["logit_real/t0"] == 2.0
    assert "logit_real/t1" not in means


def test_rows_of_the_ranks_come_with_the_sums_in_one_exchange(ranks, monkeypatch):
    exchanges = []

    def sum_of_two(flat: torch.Tensor) -> torch.Tensor:
        exchanges.append(flat.clone())
        flat[-2:] += torch.tensor([3.0, math.nan])  # the row of the other rank
        return flat

    monkeypatch.setattr(ranks, "sum", sum_of_two)
    sums, rows = StatisticsSum(DECLARED), torch.tensor([[1.5, 2.5], [0.0, 0.0]], dtype=torch.float64)
    sums.add(statistics(4.0))
    assert sums.take(ranks, rows)["loss_g"] == pytest.approx(4.0)
    assert len(exchanges) == 1
    assert rows[0].tolist() == [1.5, 2.5] and rows[1, 0] == 3.0 and rows[1, 1].isnan()


def test_saved_sums_continue_where_they_were(ranks):
    first, second = StatisticsSum(DECLARED), StatisticsSum(DECLARED)
    first.add(statistics(1.0))
    second.load(first.state(), CPU)
    second.add(statistics(3.0))
    assert second.take(ranks)["loss_d_real"] == pytest.approx(2.0)


def test_replaced_samples_are_summed_and_survive_a_checkpoint(ranks):
    first, second = StatisticsSum(DECLARED), StatisticsSum(DECLARED)
    first.add(statistics(1.0))
    first.count_replaced(3)
    second.load(first.state(), CPU)
    second.add(statistics(1.0))
    second.count_replaced(2)
    assert second.take(ranks)["replaced_samples"] == 5
    second.add(statistics(1.0))
    assert second.take(ranks)["replaced_samples"] == 0


def test_sums_of_a_version_that_counted_otherwise_are_left_out(ranks):
    sums = StatisticsSum(DECLARED)
    sums.load({name: value for name, value in statistics(9.0).items() if name != "updates_g"}, CPU)
    assert sums.state() == {}
    sums.add(statistics(1.0))
    assert sums.take(ranks)["loss_g"] == pytest.approx(1.0)


def test_a_statistic_without_a_declaration_is_refused(ranks):
    sums = StatisticsSum(())
    sums.add({"loss_g": torch.tensor(1.0)})
    with pytest.raises(KeyError, match="loss_g"):
        sums.take(ranks)


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
