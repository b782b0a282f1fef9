"""The best interval: what Daly's paper states of it, and that it loses least."""

import math

import pytest

from trainer.report.interval import daly, share_lost, young


def test_young_s_interval_loses_least_in_first_order() -> None:
    best = young(60, 24 * 3600)
    least = share_lost(best, 60, 24 * 3600)
    assert all(share_lost(best * factor, 60, 24 * 3600) > least for factor in (0.5, 0.9, 1.1, 2))


@pytest.mark.parametrize(("save_s", "between_s"), [(60, 86_400), (300, 3600), (600, 7200)])
def test_daly_s_interval_loses_least_of_exponential_failures(save_s: float, between_s: float) -> None:
    """Daly's Eq. 20, the expected time of one interval without restart times, over the work that it saves: its own
    minimum is found by trying. His estimate is within 1% of the minimum's loss for C < M / 2."""

    def cost(interval: float) -> float:
        return between_s * math.expm1((interval + save_s) / between_s) / interval

    tried = min(cost(second) for second in range(10, 60_000, 5))
    assert cost(daly(save_s, between_s)) == pytest.approx(tried, rel=0.01)
    assert cost(daly(save_s, between_s)) <= cost(young(save_s, between_s))


def test_where_saving_takes_longer_than_runs_live_the_interval_is_that_life() -> None:
    assert daly(100, 40) == 40
