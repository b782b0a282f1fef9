import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.algorithm.schedules import LearningRateConfig, ReconstructionConfig, learning_rate, reconstruction_weight

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


def test_reconstruction_weight_falls_from_its_value_over_half_of_it_to_zero_and_stays_there():
    config = ReconstructionConfig(weight=8.0, decay_images=1000)
    assert reconstruction_weight(config, 0) == 8.0
    assert reconstruction_weight(config, 500) == pytest.approx(4.0)
    assert reconstruction_weight(config, 1000) == reconstruction_weight(config, 5000) == 0.0


def test_reconstruction_weight_without_decay_stays():
    assert reconstruction_weight(ReconstructionConfig(weight=8.0), 10**9) == 8.0
