"""The loop's arithmetic: shares of a batch, when a run is over."""

import pytest
import torch

from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer.rank.loop import Share


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (2, 8), (3, 4), (3, 8), (4, 4)])
def test_shares_of_all_ranks_tile_the_global_batch_in_whole_groups(tiny, tmp_path, world_size, micro_batch_size):
    sizes = (f"scaling.world_size={world_size}", f"training.micro_batch_size={micro_batch_size}")
    config = configure(tiny, tmp_path, *sizes)
    shares = [Share.of(config, rank, world_size) for rank in range(world_size)]
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(16))
    assert {(share.start % 4, share.stop % 4) for share in shares} == {(0, 0)}
    assert len({share.grad_accum_steps for share in shares}) == 1  # the reductions need all ranks
    assert {share.grad_accum_steps - share.num_micro_batches for share in shares} <= {0, 1}


def test_images_are_rounded_up_to_whole_steps(tiny, tmp_path):
    outcome, _ = train(configure(tiny, tmp_path, "training.total_images=33"))
    assert (outcome.finished, outcome.step, outcome.images) == (True, 3, 48)


def test_driver_hears_of_each_step(tiny, tmp_path):
    driver = Stopper()
    train(configure(tiny, tmp_path, "training.total_images=96"), driver)
    assert [(status.step, status.images, status.total_images) for status in driver.seen] == [
        (step, 16 * step, 96) for step in range(1, 7)
    ]
    assert driver.seen[2].losses == {}
    assert driver.seen[4].losses.keys() == {"loss_d_real", "loss_d_fake", "loss_g"}  # since the log point at 4
    assert driver.seen[4].images_per_s > 0


def test_bf16_run_keeps_its_state_in_float32(tiny, tmp_path):
    outcome, recorder = train(configure(tiny, tmp_path, "training.precision=bf16", "training.total_images=64"))
    assert outcome.finished
    assert 0 < recorder.metrics[4]["loss_g"] < 10
    assert {tensor.dtype for tensor in state_of(tmp_path, 4).values()} == {torch.float32}


RISING = (
    "training.augmentation.transforms=[shift, cutout]",
    "training.augmentation.probability={start: 0.0, end: 1.0, decay_images: 64}",
)
SETS = ("training.total_images=96", "tracking.log_interval_steps=1")


@pytest.fixture(scope="module")
def augmented_run(tiny, tmp_path_factory):
    """The directory of an undisturbed run, and its curves."""
    directory = tmp_path_factory.mktemp("augmented") / "run"
    _, recorder = train(configure(tiny, directory, *SETS, *RISING))
    return directory, recorder.metrics


@pytest.mark.slow
def test_an_augmented_run_that_stops_and_continues_ends_as_an_undisturbed_one(augmented_run, tiny, tmp_path):
    train(configure(tiny, tmp_path, *SETS, *RISING), Stopper(at=3))
    assert train(configure(tiny, tmp_path, *SETS, *RISING))[0].finished
    assert_same_state(state_of(tmp_path, 6), state_of(augmented_run[0], 6))


def test_the_probability_of_each_step_is_a_curve(augmented_run):
    curve = [augmented_run[1][step]["augmentation_probability"] for step in range(1, 7)]
    assert curve == pytest.approx([0, 0.1464466, 0.5, 0.8535534, 1, 1])


@pytest.mark.slow
def test_a_run_without_augmentation_has_no_such_curve_and_the_first_step_of_a_rising_one(augmented_run, tiny, tmp_path):
    off = ("training.augmentation.transforms=[flip]", "training.augmentation.probability=0")
    _, recorder = train(configure(tiny, tmp_path / "off", *SETS, *off))
    _, without = train(configure(tiny, tmp_path / "without", *SETS))
    assert_same_state(state_of(tmp_path / "off", 6), state_of(tmp_path / "without", 6))
    assert all("augmentation_probability" not in curves for curves in recorder.metrics.values())
    for name in ("loss_d_real", "loss_d_fake", "loss_g", "gradient_norm_d", "gradient_norm_g"):
        assert augmented_run[1][1][name] == without.metrics[1][name]
        assert augmented_run[1][2][name] != without.metrics[2][name]


ADAPTIVE = (
    "training.augmentation.adaptive.target=0.01",
    "training.augmentation.adaptive.images=256",
    "training.objective=relativistic",
)
"""With steps of 16 images, the probability changes by a quarter."""
BEFORE = "{calm: {images: 48, training: {r1_gamma: 0.5}}}"


@pytest.mark.slow
def test_an_adaptive_probability_survives_stops_and_starts_at_0_in_each_stage(tiny, tmp_path):
    sets = (*ADAPTIVE, f"stages={BEFORE}", "training.total_images=208", "tracking.log_interval_steps=1")
    _, recorder = train(configure(tiny, tmp_path / "whole", *sets))
    curve = [recorder.metrics[step]["augmentation_probability"] for step in range(1, 14)]
    # The stage calm ends before its fourth step; the next one changes after steps 7 and 11.
    assert curve[:6] == [0] * 6
    assert all(value in (0, 0.25, 0.5) for value in curve)
    assert set(curve) > {0}
    for stop in (3, 5, 9):
        train(configure(tiny, tmp_path / f"{stop}", *sets), Stopper(at=stop))
        assert train(configure(tiny, tmp_path / f"{stop}", *sets))[0].finished
        assert_same_state(state_of(tmp_path / f"{stop}", 13), state_of(tmp_path / "whole", 13))
    assert "rank-00000/extra/augmentation/probability" in state_of(tmp_path / "whole", 13)


NORMALIZED = (
    "training.gradient_normalization=true",
    "training.transport={start: 0.1, end: 0.002, decay_images: 64}",
    "discriminator.sees=marginal",
)


PREDICTING = (
    "training.gradient_normalization=true",
    "training.afd={start: 1.0, end: 0.1, decay_images: 64}",
    "training.denoising={start: 1.0, end: 0.0, decay_images: 48}",
    "discriminator.sees=marginal",
    "discriminator.predicts=[x_t, x0]",
    "discriminator.kind=resnext",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "curves"), [(NORMALIZED, ["transport"]), (PREDICTING, ["afd_regression", "denoising"])]
)
def test_the_scale_of_the_games_gradient_survives_stops_and_starts_anew_in_each_stage(tiny, tmp_path, more, curves):
    sets = (*more, f"stages={BEFORE}", "training.total_images=112", "tracking.log_interval_steps=1")
    _, recorder = train(configure(tiny, tmp_path / "whole", *sets))
    assert all(0 < recorder.metrics[7][curve] < 10 for curve in curves)
    for stop in (2, 3, 5):
        train(configure(tiny, tmp_path / f"{stop}", *sets), Stopper(at=stop))
        assert train(configure(tiny, tmp_path / f"{stop}", *sets))[0].finished
        assert_same_state(state_of(tmp_path / f"{stop}", 7), state_of(tmp_path / "whole", 7))
    assert state_of(tmp_path / "whole", 7)["rank-00000/extra/gradient_scale/mean_square"] > 0
