"""A config with stages: what each stage is, and what is said against one."""

import pytest

from tests.trainer.refusals import make, refusals
from trainer.algorithm.schedules import Cosine
from trainer.config.draft import ConfigError
from trainer.config.io import dump_config, load_config
from trainer.config.resume import check_resumable
from trainer.config.stages import of_length, stage_after, stage_before, stages_of

DENOISER = {"images": 192, "training": {"objective": "gaussian", "adam": {"beta1": 0.9}}}
HIGH = {"images": 128, "diffusion": {"num_timesteps": 6}}
TEXT = """
run: {directory: r}
data: {path: d, image_size: 32}
training: {total_images: 1000, global_batch_size: 64}
stages:
  denoiser:
    images: 192
    training:
      objective: gaussian
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


def lines_of(file, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(str(file), overrides)
    return [line.removeprefix(f"{file}:") for line in caught.value.lines]


def test_a_stage_has_the_settings_of_the_config_but_for_its_own():
    first, second, last = stages_of(make(stages={"denoiser": DENOISER, "six": HIGH}))
    assert [stage.name for stage in (first, second, last)] == ["denoiser", "six", "last"]
    assert (first.config.training.objective, first.config.training.adam.beta1) == ("gaussian", 0.9)
    assert (second.config.training.objective, second.config.diffusion.num_timesteps) == ("non_saturating", 6)
    assert last.config.training.adam == second.config.training.adam != first.config.training.adam
    assert last.config.stages == first.config.stages == {}


def test_stages_share_the_steps_and_the_images_of_the_run():
    config = make(stages={"denoiser": DENOISER, "six": HIGH})
    spans = [(stage.first_step, stage.last_step, stage.config.training.total_images) for stage in stages_of(config)]
    assert spans == [(0, 3, 192), (3, 5, 128), (5, 16, 1000 - 5 * 64)]
    assert [stage_after(config, step).number for step in (0, 2, 3, 4, 5, 15, 16)] == [1, 1, 2, 2, 3, 3, 3]
    assert [stage_before(config, step).number for step in (0, 1, 3, 4, 5, 6, 16)] == [1, 1, 1, 2, 2, 3, 3]


def test_all_that_training_counts_in_images_keeps_its_share_of_a_run_of_another_length():
    shorter = load_config("cifar10-fast", of_length(load_config("cifar10-fast"), 450_000))
    first, last = (stage.config.training for stage in stages_of(shorter))
    assert (first.total_images, first.total_images + last.total_images) == (250_112, 450_000)  # 977 whole steps of 256
    assert first.learning_rate_g.warmup_images == 5_000
    assert (last.learning_rate_g.delay_images, last.ema_half_life_images) == (2_000, 5_000)
    assert last.r1_gamma == Cosine(start=0.05, end=0.005, decay_images=200_000)
    assert last.global_batch_size == 256
    assert of_length(load_config("cifar10"), 1_000) == ["training.total_images=1000"]


def test_a_config_without_stages_is_one_stage():
    (stage,) = stages_of(config := make())
    assert (stage.name, stage.number, stage.first_step, stage.last_step, stage.config) == ("", 1, 0, 16, config)


def test_a_config_with_stages_survives_its_own_yaml(file):
    config = load_config(str(file))
    again = file.with_name("again.yaml")
    again.write_text(dump_config(config))
    assert load_config(str(again)) == config
    assert list(config.stages) == ["denoiser"]


def test_a_mistake_in_a_stage_is_named_with_its_line_and_its_stage(file):
    file.write_text(TEXT + "      micro_batch_size: -3\n      learning_rat_g: 1\n")
    first, second = lines_of(file)
    assert first == "10: in stage denoiser, training.micro_batch_size must be a whole number > 0, or null, got -3"
    assert second.startswith(
        "11: in stage denoiser, training.learning_rat_g is unknown; did you mean `learning_rate_g`?"
    )


def test_a_rule_that_only_a_stage_breaks_is_named_with_its_stage(file):
    (line,) = lines_of(file, "stages.denoiser.training.micro_batch_size=5")
    assert line.startswith(
        "--set stages.denoiser.training.micro_batch_size=5: in stage denoiser, training.micro_batch_size"
    )


def test_a_stage_that_the_config_does_not_have_cannot_be_set(file):
    (line,) = lines_of(file, "stages.denoisser.images=128")
    assert line == "--set stages.denoisser.images=128: the config has no stage denoisser; did you mean `denoiser`?"
    (line,) = lines_of(file, "stages.x.images=128")
    assert line == "--set stages.x.images=128: the config has no stage x. Its stages: denoiser"


def test_stages_can_be_set_and_removed_as_a_whole(file):
    assert load_config(str(file), ["stages={}"]).stages == {}
    config = load_config(str(file), ["stages={a: {images: 64}, b: {images: 64}}", "stages.b.images=128"])
    assert [(name, stage.images) for name, stage in config.stages.items()] == [("a", 64), ("b", 128)]


@pytest.mark.parametrize("name", ["last", "a b", "1st", "", "a.b", "a\x00", "a" * 50])
def test_names_that_no_message_could_show_are_refused(name):
    (line,) = refusals(stages={name: HIGH})
    assert line.startswith(f"stages: {name!r} cannot be the name of a stage: a name is a letter")


def test_a_stage_has_at_least_one_step_and_leaves_one_for_the_last():
    (line,) = refusals(stages={"short": HIGH | {"images": 63}})
    assert line == ("stages.short.images is 63, less than the 64 of training.global_batch_size, which one step takes")
    (line,) = refusals(stages={"a": HIGH | {"images": 500}, "b": HIGH | {"images": 480}})
    assert line.startswith("training.total_images is 1000, of which the stages a, b take 980 and leave none")


@pytest.mark.parametrize("field", ["total_images", "global_batch_size", "precision"])
def test_what_all_stages_share_cannot_be_set_in_one(field):
    (line,) = refusals(stages={"six": HIGH | {"training": {field: 128 if field != "precision" else "fp32"}}})
    assert line.startswith(f"stages.six.training.{field} cannot be set: ")


def test_a_run_with_other_stages_does_not_resume():
    config = make(stages={"denoiser": DENOISER})
    check_resumable(config, make(stages={"denoiser": DENOISER}))
    for other in ({}, {"denoiser": DENOISER | {"images": 256}}, {"denoiser": DENOISER, "six": HIGH}):
        with pytest.raises(ConfigError, match="stages"):
            check_resumable(config, make(stages=other))
