import dataclasses

import pytest

from trainer.config import TrainConfig, split_batch
from trainer.config_io import from_dict


def make(**sections: dict) -> TrainConfig:
    values: dict = {
        "run": {"directory": "r"},
        "data": {"path": "d", "image_size": 32},
        "training": {"total_images": 1000, "global_batch_size": 64},
    }
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields
    return from_dict(values)


def refusals(**sections: dict) -> list[str]:
    with pytest.raises(ValueError) as caught:
        make(**sections)
    return [line.removeprefix("config: ") for line in str(caught.value).splitlines()]


def test_global_batch_is_micro_times_accum_times_world():
    split = split_batch(make(training={"micro_batch_size": 8}, scaling={"world_size": 2}))
    assert dataclasses.astuple(split) == (64, 2, 32, 8, 4)


def test_without_micro_batch_a_rank_takes_its_images_at_once():
    split = split_batch(make(scaling={"world_size": 4}))
    assert (split.micro_batch_size, split.grad_accum_steps) == (16, 1)


def test_global_batch_that_the_ranks_do_not_divide_shows_the_arithmetic():
    assert refusals(training={"global_batch_size": 250}, scaling={"world_size": 4}) == [
        "training.global_batch_size (250) must be a multiple of scaling.world_size (4): 250 / 4 = 62.5 images each. "
        "With 4 ranks use 248 or 252"
    ]


def test_more_ranks_than_images_shows_the_arithmetic():
    assert refusals(training={"global_batch_size": 2}, scaling={"world_size": 4}) == [
        "training.global_batch_size (2) must be a multiple of scaling.world_size (4): 2 / 4 = 0.5 images each. "
        "With 4 ranks use 4"
    ]


def test_micro_batch_that_does_not_divide_the_rank_shows_the_arithmetic():
    assert refusals(training={"micro_batch_size": 24}, scaling={"world_size": 2}) == [
        "training.micro_batch_size (24) must divide the 32 images of a rank: global batch 64 = micro 24 x accum 1.333 "
        "x world 2. Use one of 1, 2, 4, 8, 16, 32"
    ]


def test_micro_batch_that_the_deviation_groups_do_not_divide_is_refused():
    assert refusals(training={"global_batch_size": 12, "micro_batch_size": 6}) == [
        "training.micro_batch_size: global batch 12 = micro 6 x accum 2 x world 1, and a batch of 6 images cannot be "
        "split into groups of stddev_group_size 4: the images that the discriminator sees at once must be a multiple "
        "of 4, or fewer than that. Change the micro batch size or discriminator.stddev_group_size"
    ]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_micro_batch_below_the_deviation_group_is_one_group(micro_batch_size):
    config = make(training={"global_batch_size": 6, "micro_batch_size": micro_batch_size})
    assert split_batch(config).micro_batch_size == micro_batch_size


def test_image_size_that_the_levels_cannot_halve_is_refused():
    (line,) = refusals(data={"image_size": 40}, generator={"channel_multipliers": [1, 1, 1, 1, 1]})
    assert line == (
        "generator: image_size is 40, but channel_multipliers (1, 1, 1, 1, 1) make 5 levels, which need a multiple of "
        "2 ** 4 = 16: prepare images of such a size or take fewer channel_multipliers"
    )


def test_attention_at_a_resolution_that_no_level_has_is_refused():
    assert refusals(generator={"attention_resolutions": [16, 12]}) == [
        "generator: attention_resolutions has 12, but at image_size 32 the levels have the sides [32, 16, 8, 4]: "
        "choose among these, or none"
    ]


def test_width_that_group_norm_cannot_split_is_refused():
    (line,) = refusals(generator={"base_channels": 30})
    assert line.startswith("generator: a layer of 30 channels cannot be split into 7 equal groups for group norm.")


def test_large_discriminator_on_small_images_is_refused():
    assert refusals(discriminator={"kind": "large"}) == [
        "discriminator.kind is large: image_size is 32, but the large discriminator halves it 6 times, which needs a "
        "multiple of 64: prepare images of such a size or choose another discriminator.kind of small, large"
    ]


def test_small_discriminator_on_large_images_is_refused():
    assert refusals(data={"image_size": 256}, generator={"attention_resolutions": [64]}) == [
        "discriminator.kind is small: it halves data.image_size 256 only 3 times, so none of its outputs sees the "
        "whole image; it is for images up to 64 pixels. Use kind large"
    ]


def test_warmup_as_long_as_the_run_is_refused():
    assert refusals(training={"learning_rate_d": {"warmup_images": 1000}}) == [
        "training.learning_rate_d.warmup_images (1000) must be less than training.total_images (1000), or the rate "
        "never reaches its peak"
    ]


def test_all_broken_rules_are_reported_together():
    assert len(refusals(scaling={"world_size": 3}, discriminator={"kind": "large"}, data={"image_size": 36})) == 3


def test_partitioned_discriminator_parameters_are_refused():
    (line,) = refusals(engine={"zero_stage_d": 3})
    assert line.startswith("engine: zero_stage_d is 3, at most 2 is possible")


def test_zero_stages_of_the_plain_backend_are_refused():
    (line,) = refusals(engine={"backend": "torch", "zero_stage_g": 1})
    assert line == (
        "engine: backend torch has no ZeRO, zero_stage_g is 1 and zero_stage_d 0: set both to 0 or the backend to "
        "deepspeed"
    )
