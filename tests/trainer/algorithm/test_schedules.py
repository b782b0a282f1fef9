import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.algorithm.augmentation import AdaptiveConfig, AdaptiveProbability
from trainer.algorithm.schedules import (
    Cosine,
    DecayCosine,
    LearningRateConfig,
    ema_decay,
    is_zero,
    learning_rate,
    value_at,
)

COSINE = LearningRateConfig(peak=2e-4, final=1e-5, warmup_images=0)
WARM = LearningRateConfig(peak=2e-4, final=1e-5, warmup_images=1000)


def test_rate_starts_at_peak_without_warmup():
    assert learning_rate(COSINE, 0, 10_000) == 2e-4


def test_rate_is_the_mean_of_peak_and_final_half_way():
    assert learning_rate(COSINE, 5_000, 10_000) == pytest.approx((2e-4 + 1e-5) / 2, rel=1e-12)


def test_rate_ends_at_final_and_stays_there():
    assert learning_rate(COSINE, 10_000, 10_000) == 1e-5
    assert learning_rate(COSINE, 99_999, 10_000) == 1e-5


def test_warmup_rises_linearly_from_zero_and_meets_the_peak():
    assert learning_rate(WARM, 0, 10_000) == 0.0
    assert learning_rate(WARM, 250, 10_000) == pytest.approx(0.5e-4)
    assert learning_rate(WARM, 1000, 10_000) == 2e-4


def test_cosine_spans_only_what_follows_warmup():
    assert learning_rate(WARM, 5_500, 10_000) == pytest.approx((2e-4 + 1e-5) / 2, rel=1e-12)


def test_constant_rate_stays_at_peak():
    config = LearningRateConfig(peak=3e-4, decay="constant")
    assert {learning_rate(config, images, 100) for images in (0, 50, 100, 1000)} == {3e-4}


def test_warmup_as_long_as_the_run_ends_at_final_without_dividing_by_zero():
    assert learning_rate(WARM, 1000, 1000) == 1e-5


@given(images=st.integers(0, 20_000), total=st.integers(1, 10_000), warmup=st.integers(0, 10_000))
def test_rate_never_leaves_its_bounds(images, total, warmup):
    config = LearningRateConfig(peak=2e-4, final=1e-5, warmup_images=warmup)
    rate = learning_rate(config, images, total)
    assert 0 <= rate <= 2e-4
    assert images < warmup or rate >= 1e-5


@given(images=st.integers(0, 9_999))
def test_rate_falls_from_image_to_image(images):
    assert learning_rate(COSINE, images + 1, 10_000) < learning_rate(COSINE, images, 10_000)


def test_final_above_peak_is_refused():
    with pytest.raises(ValueError, match=r"^final \(0\.001\) is above peak \(0\.0001\): set final to at most peak$"):
        LearningRateConfig(peak=1e-4, final=1e-3)


def test_final_above_peak_is_allowed_where_it_is_not_used():
    assert LearningRateConfig(peak=1e-6, decay="constant").peak == 1e-6


def test_a_course_moves_from_start_over_the_mean_to_end_and_stays():
    course = Cosine(start=0.05, end=0.005, decay_images=1000)
    assert value_at(course, 0) == 0.05
    assert value_at(course, 500) == pytest.approx((0.05 + 0.005) / 2)
    assert value_at(course, 250) == pytest.approx(0.005 + 0.045 * (1 + 0.5**0.5) / 2)  # cos(pi / 4)
    assert value_at(course, 1000) == value_at(course, 10**9) == 0.005
    assert value_at(DecayCosine(start=0.9, end=0.99, decay_images=1000), 500) == pytest.approx(0.945)  # may rise
    assert value_at(0.3, 500) == 0.3


def test_a_weight_is_zero_only_if_it_is_zero_throughout():
    assert is_zero(0.0)
    assert is_zero(Cosine(start=0.0, end=0.0, decay_images=1))
    assert not is_zero(Cosine(start=0.0, end=1.0, decay_images=1))
    assert not is_zero(Cosine(start=1.0, end=0.0, decay_images=1))


def test_share_of_a_weight_in_the_average_halves_over_the_half_life_at_any_batch_size():
    for batch_size in (1, 10, 50):
        decay = ema_decay(0.5, 1000.0, 0, batch_size)
        assert decay ** (1000 / batch_size) == pytest.approx(0.5)


def test_average_without_a_half_life_has_its_own_decay_and_with_none_is_the_weights():
    assert ema_decay(0.5, None, 123, 10) == 0.5
    rising = Cosine(start=0.0, end=1000.0, decay_images=100)
    assert ema_decay(0.5, rising, 0, 10) == 0.0
    assert ema_decay(0.5, rising, 100, 10) == pytest.approx(0.5**0.01)


def test_a_delay_puts_off_warmup_and_cosine():
    late = LearningRateConfig(peak=2e-4, final=1e-5, warmup_images=1000, delay_images=500)
    assert learning_rate(late, 0, 10_500) == learning_rate(late, 499, 10_500) == 0.0
    for images in (0, 250, 1000, 5_500, 10_000):
        assert learning_rate(late, 500 + images, 10_500) == pytest.approx(
            learning_rate(WARM, images, 10_000), rel=1e-12
        )
    sudden = LearningRateConfig(peak=2e-4, final=1e-5, delay_images=500)
    assert [learning_rate(sudden, images, 10_500) for images in (499, 500)] == [0.0, 2e-4]


ADAPTIVE = AdaptiveConfig(target=0.5, images=320)
"""With steps of 8 images, the probability changes by a tenth."""


def adaptive() -> AdaptiveProbability:
    return AdaptiveProbability(ADAPTIVE, 8, torch.device("cpu"))


def certainties(num_positive: int) -> Tensor:
    return torch.cat([torch.full((num_positive,), 0.1), torch.full((8 - num_positive,), -3.0)])


def test_an_adaptive_probability_rises_and_falls_with_the_mean_sign_of_four_steps():
    found = adaptive()
    # Of 8 certainties 6 positive ones have the mean sign 0.5, which is the target.
    windows = [(8, 8, 8, 8), (0, 0, 0, 0), (0, 8, 8, 8), (7, 6, 6, 6), (6, 6, 6, 6), (8, 8, 8, 0), (5, 6, 6, 6)]
    expected = [0.1, 0.0, 0.0, 0.1, 0.1, 0.1, 0.0]
    values = []
    for step, positive in enumerate([n for window in windows for n in window], start=1):
        found.count(certainties(positive)[:3])
        found.count(certainties(positive)[3:])
        found.end_step(step)
        if step % 4 == 0:
            values.append(found.value.item())
        else:
            assert found.value.item() == (values[-1] if values else 0.0)
    # (0, 8, 8, 8) and (8, 8, 8, 0) have the mean sign 0.5 as well.
    assert values == pytest.approx(expected)


def test_an_adaptive_probability_stays_between_0_and_1():
    found, values = adaptive(), []
    for step in range(1, 61):
        found.count(certainties(8))
        found.end_step(step)
        values.append(found.value.item())
    assert max(values) == values[-1] == 1.0
    assert found.value.dtype == torch.float64


def test_certainties_that_are_not_numbers_count_as_neither():
    found = adaptive()
    found.count(torch.tensor([math.nan, 1.0, 0.0, math.inf, -math.inf]))
    found.end_step(1)
    assert found.state()["signs"].item() == 1


def test_an_adaptive_probability_continues_from_its_state_within_four_steps():
    whole, first, second = adaptive(), adaptive(), adaptive()
    for step in range(1, 12):
        current = first if step < 7 else second
        if step == 7:
            second.count(certainties(0))  # of a step that was lost
            second.load({name: value.clone() for name, value in first.state().items()})
        for each in (whole, current):
            each.count(certainties(8 if step % 3 else 7))
            each.end_step(step)
    assert whole.value > 0
    assert second.state().keys() == whole.state().keys()
    assert all(torch.equal(value, whole.state()[name]) for name, value in second.state().items())
    second.load({})
    assert all(torch.equal(value, adaptive().state()[name]) for name, value in second.state().items())


@pytest.mark.parametrize(
    "damage",
    [
        {"probability": torch.tensor(1.5, dtype=torch.float64)},
        {"probability": torch.tensor(math.nan, dtype=torch.float64)},
        {"probability": torch.tensor(0.5)},
        {"signs": torch.tensor(10**6)},
        {"signs": torch.tensor([1])},
        {"more": torch.tensor(1)},
    ],
)
def test_a_state_that_is_none_is_refused(damage):
    with pytest.raises(ValueError, match="probability of augmentation"):
        adaptive().load(adaptive().state() | damage)
