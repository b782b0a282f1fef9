"""A run of several stages: a denoiser first, then the game, as one run with one exact resume."""

import pytest
import torch

from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer.checkpoint.format import list_checkpoints
from trainer.checkpoint.snapshot import load_snapshot
from trainer.checkpoint.whole import trained_discriminator, trained_generator
from trainer.config.stages import stages_of

STAGES = (
    "{denoiser: {images: 64, training: {objective: gaussian, learning_rate_g: {peak: 0.002}}, "
    "diffusion: {num_timesteps: 3}}}"
)
BORDER, STEPS = 4, 8
SETS = (f"stages={STAGES}", f"training.total_images={16 * STEPS}", "checkpoint.keep_last=100")


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """The directory of an undisturbed run, its reports and its curves."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    driver = Stopper()
    outcome, recorder = train(configure(tiny, directory, *SETS, "tracking.log_interval_steps=1"), driver)
    assert (outcome.finished, outcome.step, outcome.images) == (True, STEPS, 16 * STEPS)
    return directory, driver.seen, recorder.metrics


@pytest.mark.slow
def test_both_stages_are_one_run_with_one_progress(straight):
    directory, reports, curves = straight
    assert [(report.step, report.total_images) for report in reports] == [(n, 16 * STEPS) for n in range(1, STEPS + 1)]
    trained = ["loss_d_real" in curves[step] for step in range(1, STEPS + 1)]
    assert trained == [False] * BORDER + [True] * (STEPS - BORDER)
    assert [checkpoint.step for checkpoint in list_checkpoints(directory / "checkpoints")] == [BORDER, STEPS]
    assert sorted(path.name for path in (directory / "samples").iterdir()) == ["step-00000004.png", "step-00000008.png"]


@pytest.mark.slow
def test_rates_count_from_the_start_of_their_stage(tiny, tmp_path):
    warmup = "training.learning_rate_g.warmup_images=32"
    _, recorder = train(configure(tiny, tmp_path, *SETS, warmup, "tracking.log_interval_steps=1"))
    rates = [recorder.metrics[step]["learning_rate_g"] for step in (1, 2, 3, BORDER + 1, BORDER + 2, BORDER + 3)]
    assert rates[0] == rates[3] == 0
    assert rates[1] < rates[2] and rates[4] < rates[5]


@pytest.mark.slow
def test_the_game_begins_with_the_average_of_the_denoiser_and_a_silent_latent(tiny, tmp_path):
    train(configure(tiny, tmp_path, *SETS, *(f"training.learning_rate_g.{key}=1e-30" for key in ("peak", "final"))))
    border, end = list_checkpoints(tmp_path / "checkpoints")
    averaged, config = trained_generator(border)
    assert (config.training.objective, config.diffusion.num_timesteps) == ("gaussian", 3)
    begun, config = trained_generator(end)
    assert config.training.objective == "non_saturating"
    different = {name for name, value in begun.items() if not torch.equal(value, averaged[name])}
    assert different and all("mapping" in name for name in different)


@pytest.mark.slow
def test_the_discriminator_of_the_game_may_begin_as_the_encoder_of_the_denoiser(tiny, tmp_path, caplog):
    still = [f"training.learning_rate_{part}.{key}=1e-30" for part in "gd" for key in ("peak", "final")]
    with caplog.at_level("INFO"):
        train(configure(tiny, tmp_path, *SETS, *still, "discriminator.init_from=generator"))
    border, end = list_checkpoints(tmp_path / "checkpoints")
    encoder, began = trained_generator(border)[0], trained_discriminator(end)
    assert began is not None
    taken = {
        name for name in began for twin in encoder if torch.equal(began[name], encoder[twin]) and began[name].any()
    }
    assert {f"blocks.0.conv{i}.weight" for i in (1, 2)} <= taken and not any("time" in name for name in taken)
    assert f"the discriminator takes {len(taken)} of its {len(began)} parameters" in caplog.text


ZERO = ("engine.backend=deepspeed", "engine.zero_stage_g=3", "engine.zero_stage_d=2")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, BORDER, BORDER + 1])
def test_a_run_that_stops_anywhere_ends_as_the_straight_one(straight, tiny, tmp_path, stop):
    sets = (*SETS, "tracking.log_interval_steps=1")
    outcome, _ = train(configure(tiny, tmp_path, *sets), Stopper(at=stop))
    assert (outcome.finished, outcome.step) == (False, stop)
    assert train(configure(tiny, tmp_path, *sets))[0].finished
    assert_same_state(state_of(tmp_path, STEPS), state_of(straight[0], STEPS))


@pytest.mark.slow
def test_a_stage_goes_on_under_another_engine_with_the_same_weights(straight, tiny, tmp_path):
    sets = (*SETS, "tracking.log_interval_steps=1")
    train(configure(tiny, tmp_path, *sets), Stopper(at=BORDER))
    assert train(configure(tiny, tmp_path, *sets, *ZERO))[0].finished
    got, expected = state_of(tmp_path, STEPS), state_of(straight[0], STEPS)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_each_stage_leaves_a_snapshot_with_its_own_config(straight):
    denoiser, config = load_snapshot(straight[0] / "snapshots" / f"step-{BORDER:08d}")
    assert (config.training.objective, config.diffusion.num_timesteps, config.stages) == ("gaussian", 3, {})
    game, config = load_snapshot(straight[0] / "snapshots" / f"step-{STEPS:08d}")
    assert config.training.objective == "non_saturating"
    assert denoiser.state_dict().keys() == game.state_dict().keys()


def test_a_stage_is_rounded_to_whole_steps(tiny, tmp_path):
    config = configure(tiny, tmp_path, f"stages={STAGES}", "stages.denoiser.images=50", "training.total_images=100")
    spans = [(stage.first_step, stage.last_step, stage.config.training.total_images) for stage in stages_of(config)]
    assert spans == [(0, 4, 64), (4, 7, 36)]
