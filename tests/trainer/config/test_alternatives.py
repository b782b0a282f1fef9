"""Settings that take a number, or a mapping that says how it changes over the run; augmentation among them."""

import json

import pytest

from tests.trainer.refusals import make, refusals
from trainer.algorithm.augmentation import AdaptiveConfig, AugmentationConfig
from trainer.algorithm.methods import make_method
from trainer.algorithm.schedules import Cosine, DecayCosine, ProbabilityCosine
from trainer.config.draft import ConfigError
from trainer.config.explain import explain, schema
from trainer.config.io import flat, from_dict, load_config, to_dict
from trainer.config.resume import check_resumable, diff_configs

COURSE = {"start": 0.05, "end": 0.005, "decay_images": 1000}
TAKES = "a number >= 0, or a mapping with the keys start, end, decay_images"


def test_both_forms_are_read_and_written():
    config = make(training={"r1_gamma": COURSE, "adam": {"beta2": {"start": 0.9, "end": 0.99, "decay_images": 10}}})
    assert config.training.r1_gamma == Cosine(**COURSE)
    assert config.training.adam.beta2 == DecayCosine(start=0.9, end=0.99, decay_images=10)
    assert config.training.r2_gamma == 0.0
    assert from_dict(to_dict(config)) == config
    assert flat(config)["training.r1_gamma.end"] == 0.005


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (-1, f"training.r1_gamma must be {TAKES}, got -1"),
        ("much", f'training.r1_gamma must be {TAKES}, got the text "much"'),
        ([0.1], f"training.r1_gamma must be {TAKES}, got [0.1]"),
        (None, f"training.r1_gamma must be {TAKES}, got null"),
        ({**COURSE, "end": -1}, "training.r1_gamma.end must be a number >= 0, got -1"),
        ({"start": 1, "end": 0}, "training.r1_gamma.decay_images is missing; it must be a whole number > 0"),
        (
            {**COURSE, "decay_image": 5},
            "training.r1_gamma.decay_image is unknown; did you mean `decay_images`? Allowed in training.r1_gamma: "
            "start, end, decay_images",
        ),
    ],
)
def test_what_is_neither_gets_one_error_and_a_mapping_those_of_its_keys(value, said):
    assert refusals(training={"r1_gamma": value}) == [said]


def test_bounds_hold_in_both_forms():
    (line,) = refusals(training={"adam": {"beta2": {"start": 0.9, "end": 1.0, "decay_images": 10}}})
    assert line == "training.adam.beta2.end must be a number >= 0 and < 1, got 1.0"


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.r1_gamma={start: 0.05, end: 0.005, decay_images: 1000}"],
        ["training.r1_gamma.start=0.05", "training.r1_gamma.end=0.005", "training.r1_gamma.decay_images=1_000"],
    ],
)
def test_an_override_gives_a_course_whole_or_by_key_in_place_of_a_number(overrides):
    assert load_config("digits", overrides).training.r1_gamma == Cosine(**COURSE)
    assert load_config("digits", [*overrides, "training.r1_gamma=1.5"]).training.r1_gamma == 1.5


def test_an_override_that_leaves_a_key_out_is_told_which():
    with pytest.raises(ConfigError) as caught:
        load_config("digits", ["training.r1_gamma.start=0.05", "training.r1_gamma.end=0"])
    (line,) = caught.value.lines
    assert line.startswith("--set training.r1_gamma.start=0.05: training.r1_gamma.decay_images is missing")


def test_a_resumed_run_keeps_the_course():
    number, course = make(training={"r1_gamma": 0.05}), make(training={"r1_gamma": COURSE})
    assert [difference.key for difference in diff_configs(number, course)] == [
        "training.r1_gamma.start",
        "training.r1_gamma.end",
        "training.r1_gamma.decay_images",
        "training.r1_gamma",
    ]
    for old, new in ((number, course), (course, number)):
        with pytest.raises(ConfigError, match=r"training\.r1_gamma: .* may not change when a run is resumed"):
            check_resumable(old, new)
    assert check_resumable(course, course) == ()


def test_both_forms_are_explained_and_in_the_schema():
    assert f"`training.r1_gamma`: {TAKES} (default: 0.05)" in explain("training.r1_gamma")
    properties = json.loads(schema())["$defs"]
    assert {"$ref": "#/$defs/Cosine"} in properties["TrainingConfig"]["properties"]["r1_gamma"]["anyOf"]
    assert properties["Cosine"]["additionalProperties"] is False
    assert properties["Cosine"]["properties"]["end"]["description"] == "Value after decay_images images."


RISING = {"start": 0.0, "end": 0.55, "decay_images": 20_000_000}
PROBABILITY = "a number >= 0 and <= 1, or a mapping with the keys start, end, decay_images"


def augmented(**settings: object) -> dict:
    return {"augmentation": settings}


def test_augmentation_takes_a_number_and_a_course():
    config = make(training=augmented(probability=RISING, transforms=["shift", "cutout"]))
    expected = AugmentationConfig(probability=ProbabilityCosine(**RISING), transforms=("shift", "cutout"))
    assert config.training.augmentation == expected
    assert from_dict(to_dict(config)) == config
    assert make(training=augmented(probability=1)).training.augmentation.is_on
    assert not make().training.augmentation.is_on
    assert not make(training=augmented(probability={**RISING, "end": 0.0})).training.augmentation.is_on


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"probability": 1.1}, f"training.augmentation.probability must be {PROBABILITY}, got 1.1"),
        ({"probability": -0.1}, f"training.augmentation.probability must be {PROBABILITY}, got -0.1"),
        (
            {"probability": {**RISING, "end": 2}},
            "training.augmentation.probability.end must be a number >= 0 and <= 1, got 2",
        ),
        (
            {"transforms": ["shift", "rotate"]},
            'training.augmentation.transforms[1] must be one of flip, shift, cutout, got the text "rotate"',
        ),
        (
            {"transforms": []},
            "training.augmentation.transforms must be a list, each item one of flip, shift, cutout of at least 1 item, "
            "got []",
        ),
        (
            {"transforms": ["flip", "flip"]},
            "training.augmentation: transforms is [flip, flip], but each is drawn once for an image: name each once",
        ),
        (
            {"probability": 0.3, "adaptive": {}},
            "training.augmentation: adaptive is set, whose probability starts at 0, but probability is not 0: set "
            "probability to 0, or adaptive to null",
        ),
        (
            {"adaptive": {"target": 1.0}},
            "training.augmentation.adaptive.target must be a number > 0 and < 1, got 1.0",
        ),
    ],
)
def test_augmentation_that_cannot_be_is_refused(settings, said):
    assert refusals(training=augmented(**settings)) == [said]


def test_points_cannot_be_augmented():
    points = {"discriminator": {"kind": "mlp"}, "generator": {"kind": "mlp"}}
    (line,) = refusals(training=augmented(probability=0.3), **points)
    assert "discriminator.kind is mlp" in line and "set training.augmentation.probability to 0" in line
    make(training=augmented(transforms=["shift"]), **points)


PREDICTIONS = [
    (
        {"denoising": 1.0},
        {},
        "training.denoising has a weight, but the discriminator does not predict x0: set discriminator.predicts to "
        "[x0], or training.denoising to 0",
    ),
    (
        {"afd": 1.0, "denoising": 1.0},
        {"predicts": ["x0"], "sees": "marginal"},
        "training.afd has a weight, but the discriminator does not predict x_t: set discriminator.predicts to [x0, "
        "x_t], or training.afd to 0",
    ),
    (
        {"denoising": 1.0},
        {"predicts": ["x_t", "x0"], "sees": "marginal"},
        "discriminator.predicts holds x_t, but training.afd is 0, so that it would not be trained: set training.afd "
        "above 0, or discriminator.predicts to [x0]",
    ),
    (
        {"afd": {"start": 1.0, "end": 0.1, "decay_images": 10}},
        {"predicts": ["x_t"]},
        "training.afd compares x_t with the discriminator's prediction of it, but discriminator.sees is pair, with "
        "which it is given x_t: set discriminator.sees to marginal, or training.afd to 0",
    ),
    (
        {"afd": 1.0, "transport": 0.1},
        {"predicts": ["x_t"], "sees": "marginal"},
        "training.transport and training.afd both have a weight, but the transport loss is a part of afd: set one of "
        "them to 0",
    ),
    ({}, {"predicts": ["x0", "x0"]}, "discriminator: predicts is [x0, x0]: name each prediction once"),
]


@pytest.mark.parametrize(("training", "discriminator", "said"), PREDICTIONS)
def test_predictions_that_nothing_trains_or_that_are_not_made_are_refused(training, discriminator, said):
    assert refusals(training=training, discriminator=discriminator) == [said]


def test_a_stage_without_a_discriminator_may_leave_its_predictions_to_a_later_one():
    game = {"training": {"afd": 1.0}, "discriminator": {"predicts": ["x_t"], "sees": "marginal"}}
    make(training={"objective": "gaussian"}, discriminator=game["discriminator"])
    make(**game, stages={"denoiser": {"images": 64, "training": {"objective": "gaussian"}}})


def test_a_denoiser_before_an_augmented_game_is_not_augmented():
    config = load_config("cifar10-fast", ["training.augmentation.probability=0.3"])
    game = make_method(config.training, config.generator)
    assert getattr(game, "augmentation", None) == AugmentationConfig(probability=0.3)
    denoiser = make(training={"objective": "gaussian", **augmented(probability=0.3)})
    assert not hasattr(make_method(denoiser.training, denoiser.generator), "augmentation")


def test_a_stage_can_have_its_own_augmentation():
    stage = "{calm: {images: 128, training: {augmentation: {probability: 0.1}}}}"
    config = load_config("digits", [f"stages={stage}", "training.augmentation.transforms=[shift]"])
    assert config.stages["calm"].training == {"augmentation": {"probability": 0.1}}
    with pytest.raises(ConfigError, match=r"augmentation\.probability must be a number"):
        load_config("digits", [f"stages={stage.replace('0.1', '3')}"])


def test_a_resumed_run_keeps_its_augmentation():
    with pytest.raises(ConfigError, match="it changes what the discriminator sees"):
        check_resumable(make(), make(training=augmented(probability=0.3)))


def test_an_adaptive_probability_is_a_section_of_its_own():
    expected = AugmentationConfig(adaptive=AdaptiveConfig(target=0.5, images=500_000))
    assert expected.is_on
    assert make(training=augmented(adaptive={"target": 0.5})).training.augmentation == expected
    assert load_config("digits", ["training.augmentation.adaptive.target=0.5"]).training.augmentation == expected
