from typing import get_args

import pytest

from tests.trainer.refusals import make, refusals
from trainer.algorithm.losses import OBJECTIVES
from trainer.config.sections import ObjectiveName
from trainer.config.train_config import split_batch


def test_a_batch_that_cannot_be_spread_is_refused_by_the_config():
    (line,) = refusals(training={"global_batch_size": 250}, scaling={"world_size": 4})
    assert line.startswith("training.global_batch_size (250) must be a multiple of discriminator.stddev_group_size (4)")
    (line,) = refusals(discriminator={"stddev_grouping": "strided"}, scaling={"world_size": 3})
    assert line.startswith("training.global_batch_size (64) must be a multiple of scaling.world_size (3) with")


def test_grouping_decides_how_the_batch_is_split():
    micro = {"training": {"micro_batch_size": 12}, "scaling": {"world_size": 5}}
    assert split_batch(make(**micro)).group_size == 4
    strided = {"training": {"micro_batch_size": 8}, "discriminator": {"stddev_grouping": "strided"}}
    assert split_batch(make(**strided)).group_size == 8


def test_image_size_that_the_levels_cannot_halve_is_refused():
    (line,) = refusals(data={"image_size": 40}, generator={"channel_multipliers": [1, 1, 1, 1, 1]})
    assert line == (
        "generator: image_size is 40, but channel_multipliers (1, 1, 1, 1, 1) make 5 levels, which need a multiple of "
        "2 ** 4 = 16: prepare images of such a size, or give fewer channel_multipliers"
    )


def test_attention_at_a_resolution_that_no_level_has_is_refused():
    assert refusals(generator={"attention_resolutions": [16, 12]}) == [
        "generator: attention_resolutions has 12, but at image_size 32 the levels have the sides [32, 16, 8, 4]: "
        "choose from these, or give an empty list"
    ]


def test_width_that_group_norm_cannot_split_is_refused():
    (line,) = refusals(generator={"base_channels": 30})
    assert line.startswith("generator: a layer of 30 channels cannot be split into 7 equal groups for group norm.")


def test_large_discriminator_on_small_images_is_refused():
    assert refusals(discriminator={"kind": "large"}) == [
        "discriminator.kind is large: image_size is 32, but the large discriminator halves it 6 times, which needs a "
        "multiple of 64: prepare images of such a size, or choose another discriminator.kind from small, large"
    ]


def test_small_discriminator_on_large_images_is_refused():
    assert refusals(data={"image_size": 256}, generator={"attention_resolutions": [64]}) == [
        "discriminator.kind is small: it halves data.image_size 256 only 3 times, so none of its outputs sees the "
        "whole image; it is for images up to 64 pixels. Use kind large"
    ]


def test_fewest_ranks_above_the_most_are_refused():
    (line,) = refusals(scaling={"world_size": 2, "min_world_size": 3})
    assert line.startswith("scaling: min_world_size is 3, more than the 2 of world_size")


def test_number_of_ranks_that_an_elastic_run_may_come_to_must_be_able_to_share_the_batch():
    assert make(scaling={"world_size": 4, "min_world_size": 2}).scaling.min_world_size == 2
    strided = {"discriminator": {"stddev_grouping": "strided"}, "training": {"micro_batch_size": 8}}
    (line,) = refusals(scaling={"world_size": 4, "min_world_size": 2}, **strided)
    assert line.startswith(
        "scaling.min_world_size is 2 and scaling.world_size 4: the run may come to 3 ranks, but training.global_batch_"
    )


def test_strided_groups_that_fewer_ranks_would_change_are_refused():
    sizes = {"scaling": {"world_size": 2, "min_world_size": 1}, "discriminator": {"stddev_grouping": "strided"}}
    (line,) = refusals(**sizes)
    assert "the run may come to 1 ranks, but with discriminator.stddev_grouping strided the images of a forward" in line
    micro = split_batch(make(scaling={"world_size": 2}, discriminator={"stddev_grouping": "strided"})).micro_batch_size
    assert f"from {micro} to {2 * micro}. Set training.micro_batch_size to {micro}" in line
    assert make(**sizes, training={"micro_batch_size": micro}).scaling.min_world_size == 1


def test_warmup_as_long_as_the_run_is_refused():
    assert refusals(training={"learning_rate_d": {"warmup_images": 1000}}) == [
        "training.learning_rate_d.warmup_images (1000) must be less than training.total_images (1000), or the rate "
        "never reaches its peak"
    ]


def test_a_resnext_discriminator_is_for_powers_of_two_and_has_nothing_of_the_generators():
    make(discriminator={"kind": "resnext"})
    small = {"attention_resolutions": [], "channel_multipliers": [1, 2]}
    (line,) = refusals(discriminator={"kind": "resnext"}, data={"image_size": 24}, generator=small)
    assert line.startswith("discriminator.kind is resnext: image_size is 24, but the resnext discriminator halves it")
    (line,) = refusals(discriminator={"kind": "resnext", "init_from": "generator"})
    assert "whose blocks are of another kind than those of the generator: set discriminator.init_from to null" in line


def test_all_broken_rules_are_reported_together():
    assert len(refusals(scaling={"world_size": 17}, discriminator={"kind": "large"}, data={"image_size": 36})) == 3


def test_partitioned_discriminator_parameters_are_refused_with_a_second_derivative():
    (line,) = refusals(engine={"zero_stage_d": 3})
    assert line.startswith("engine.zero_stage_d is 3, but training.penalty is exact: R1 and R2 differentiate twice")
    make(engine={"zero_stage_d": 3}, training={"penalty": "finite_difference"})
    make(engine={"zero_stage_d": 3}, training={"r1_gamma": 0.0})


def test_zero_stages_of_the_plain_backend_are_refused():
    (line,) = refusals(engine={"backend": "torch", "zero_stage_g": 1})
    assert line == (
        "engine: backend torch has no ZeRO, but zero_stage_g is 1 and zero_stage_d is 0: set both to 0, or set the "
        "backend to deepspeed"
    )


def test_cuda_graphs_of_deepspeed_are_refused():
    (line,) = refusals(engine={"cuda_graphs": True})
    assert line == (
        "engine: cuda_graphs is true, but backend deepspeed decides on the host what each update does, which a graph "
        "does not repeat: set the backend to torch, or cuda_graphs to false"
    )
    assert make(engine={"cuda_graphs": True, "backend": "torch"}).engine.cuda_graphs


def test_an_unbounded_objective_without_a_penalty_is_refused():
    (line,) = refusals(training={"objective": "wasserstein", "r1_gamma": 0})
    assert line == (
        "training.objective is wasserstein, whose discriminator loss has no lower bound without a gradient penalty, "
        "but training.r1_gamma and training.r2_gamma are 0: set one of them above 0"
    )
    assert make(training={"objective": "wasserstein", "r1_gamma": 0, "r2_gamma": 1}).training.r2_gamma == 1


def test_plain_transport_without_a_penalty_and_a_normalized_transport_are_refused():
    plain = {"objective": "unbalanced_transport", "unbalanced_transport": {"divergence": "none"}, "r1_gamma": 0}
    (line,) = refusals(training=plain)
    assert "no lower bound without a gradient penalty" in line
    make(training=plain | {"unbalanced_transport": {"divergence": "kl"}})
    (line,) = refusals(training={"objective": "unbalanced_transport", "gradient_normalization": True})
    assert line.endswith("or take another objective with training.transport")


def test_the_networks_see_the_domain():
    config = make(data={"image_size": 32, "domain": "haar"})
    assert (config.image_form.shape, config.network_form.shape) == ((3, 32, 32), (12, 16, 16))
    assert make(data={"image_size": 32}).network_form == config.image_form


def test_images_that_the_haar_transform_cannot_halve_and_mirrored_coefficients_are_refused():
    (line,) = refusals(data={"image_size": 17, "domain": "haar"})
    assert "halves the image, but data.image_size is 17" in line
    (line,) = refusals(data={"domain": "haar"}, training={"augmentation": {"transforms": ["flip"], "probability": 0.5}})
    assert line.startswith("training.augmentation.transforms holds flip, but data.domain is haar")


def test_a_frozen_name_that_is_none_is_refused_with_those_there_are():
    (line,) = refusals(training={"freeze": ["generator.encoder.*"]})
    assert line == (
        "training.freeze holds generator.encoder.*, which fits no parameter: names begin with generator and go on with "
        "conv_in, conv_out, down, mapping, middle_attention, middle_block1, middle_block2, norm_out, time_embedding, "
        "up. A pattern of all that is below one of these ends with .*"
    )
    (line,) = refusals(training={"freeze": ["generator.down.*.blocks.1.conv9.*"]})
    assert "go on with conv1, conv2, norm1, norm2, " in line
    (line,) = refusals(training={"freeze": ["conv_in.weight"]})
    assert "names begin with discriminator, generator. " in line
    (line,) = refusals(training={"freeze": ["generator.down"]})  # a part, not all that is below it
    assert "conv_out, down, mapping" in line


def test_a_network_of_which_nothing_would_learn_is_refused():
    for part in ("generator", "discriminator"):
        (line,) = refusals(training={"freeze": [f"{part}.*.weight", f"{part}.*bias"]})
        assert f"which is the whole {part}" in line


def test_a_discriminator_without_a_convolution_of_the_encoder_is_refused():
    assert make(discriminator={"init_from": "generator"}).discriminator.init_from == "generator"
    assert refusals(discriminator={"init_from": "generator", "base_channels": 24}) == [
        "discriminator.init_from is generator, but none of its convolutions has the shape of one in the encoder of the "
        "generator: set discriminator.base_channels so that 8 times it is a width of the generator, which are 128, "
        "256, or discriminator.init_from to null"
    ]
    (line,) = refusals(discriminator={"init_from": "generator", "kind": "mlp"}, generator={"kind": "mlp"})
    assert "a network of kind mlp has no convolutions" in line


def test_every_objective_has_a_name_in_the_config():
    assert set(get_args(ObjectiveName)) == OBJECTIVES.keys() | {"gaussian"}  # which has no adversary


NO_ADDRESSES = ("hooks.example.org/a", "ftp://hooks.example.org/a", "https:///a", "http://h/a b", "")


@pytest.mark.parametrize("address", NO_ADDRESSES)
def test_an_address_that_none_can_be_is_refused_without_showing_it(address):
    (line,) = refusals(tracking={"notify": address})
    assert "notify is no web address; expected is one such as https://hooks.example.org/name" in line
    assert not address or address not in line.replace("https://hooks.example.org/name", "")
