from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from models.discriminator import Discriminator, DiscriminatorConfig
from models.generator import Generator, GeneratorConfig
from models.published.state_dict import (
    discriminator_from,
    generator_from,
    load_published,
    published_names,
    published_state,
)
from models.shapes import ImageForm

# reference/README.md, section 5
RELEASED: Mapping[str, dict[str, Any]] = {
    "cifar10": {"n_mlp": 4, "kind": "small"},
    "lsun_church_256": {
        "image_size": 256,
        "num_channels_dae": 64,
        "ch_mult": [1, 1, 2, 2, 4, 4],
        "num_timesteps": 4,
        "kind": "large",
    },
    "celeba_hq_256": {
        "image_size": 256,
        "num_channels_dae": 64,
        "ch_mult": [1, 1, 2, 2, 4, 4],
        "num_timesteps": 2,
        "kind": "large",
    },
}
GENERATORS = ["biggan_residual", "nofir_notanh", "oneadagn_inputskip_outputskip"]


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints_fit_without_a_key_left_over(golden_json, name: str) -> None:
    shapes = golden_json("released_checkpoint_shapes")[name]
    with torch.device("meta"):
        states = {part: {key: torch.empty(shape) for key, shape in shapes[part].items()} for part in shapes}
        generator = generator_from(RELEASED[name], states["generator"])
        discriminator = discriminator_from(RELEASED[name], states["discriminator"]).discriminator
    for part, network in (("generator", generator), ("discriminator", discriminator)):
        ours = {key: list(tensor.shape) for key, tensor in published_state(network).items()}
        assert list(ours.items()) == list(shapes[part].items())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", GENERATORS)
def test_generator_state_survives_the_way_in_and_out(golden, name: str, prefix: str) -> None:
    settings, state, _ = golden(f"generator_{name}")
    generator = generator_from(settings, {prefix + key: tensor for key, tensor in state.items()})
    back = published_state(generator)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert not generator.training


@pytest.mark.parametrize("kind", ["small", "large"])
def test_discriminator_state_survives_the_way_in_and_out(golden, kind: str) -> None:
    settings, state, _ = golden(f"discriminator_{kind}")
    del settings["kind"]  # the state tells
    network = discriminator_from(settings, {f"module.{key}": tensor for key, tensor in state.items()})
    assert (network.discriminator.config.kind, network.discriminator.config.stddev_grouping) == (kind, "strided")
    back = published_state(network.discriminator)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.slow
def test_every_parameter_has_one_published_name() -> None:
    networks = [
        Generator(GeneratorConfig(base_channels=8, latent_embedding_dim=8), ImageForm(32, 3)),
        Discriminator(DiscriminatorConfig(base_channels=4), ImageForm(32, 3)),
    ]
    for network in networks:
        names = published_names(network)
        assert set(names) == set(network.state_dict())
        assert len(set(names.values())) == len(names)


def test_published_names_follow_the_call_order() -> None:
    generator = Generator(GeneratorConfig(base_channels=8, latent_embedding_dim=8), ImageForm(32, 3))
    names = published_names(generator)
    assert names["conv_in.weight"] == "all_modules.2.weight"
    assert names["down.0.blocks.1.conv1.weight"] == "all_modules.4.Conv_0.weight"
    assert names["down.0.downsample.shortcut.bias"] == "all_modules.5.Conv_2.bias"
    assert names["down.0.pyramid.conv.weight"] == "all_modules.6.Conv2d_0.weight"
    assert names["down.1.attentions.0.query.weight"] == "all_modules.8.NIN_0.W"
    assert names["mapping.layers.1.weight"] == "z_transform.3.weight"


def test_fourier_frequencies_are_the_first_numbered_module() -> None:
    config = GeneratorConfig(base_channels=8, latent_embedding_dim=8, time_embedding="fourier")
    names = published_names(Generator(config, ImageForm(32, 3)))
    assert names["time_embedding.embedding.frequencies"] == "all_modules.0.W"
    assert names["conv_in.weight"] == "all_modules.3.weight"


def tiny(golden) -> tuple[dict[str, Any], dict[str, Tensor]]:
    settings, state, _ = golden("generator_biggan_residual")
    return settings, dict(state)


def test_missing_and_unexpected_keys_are_named(golden) -> None:
    settings, state = tiny(golden)
    state["all_modules.99.weight"] = state.pop("all_modules.2.bias")
    with pytest.raises(
        ValueError, match=r"1 missing: all_modules\.2\.bias; 1 unexpected: all_modules\.99\.weight\. Giv"
    ):
        generator_from(settings, state)


def test_only_the_first_keys_are_named(golden) -> None:
    settings, state = tiny(golden)
    with pytest.raises(ValueError, match=r"\d+ missing: [^,]+, [^,]+, [^,]+, \.\.\.; "):
        generator_from(settings | {"num_res_blocks": 2}, state)


def test_wrong_shape_is_named_with_both_shapes(golden) -> None:
    settings, state = tiny(golden)
    state["all_modules.2.weight"] = torch.zeros(8, 1, 3, 3)
    with pytest.raises(ValueError, match=r"all_modules\.2\.weight \[8, 1, 3, 3\] instead of \[8, 3, 3, 3\]"):
        generator_from(settings, state)


def test_refused_state_changes_nothing(golden) -> None:
    settings, state = tiny(golden)
    generator = generator_from(settings, state)
    broken = {key: torch.zeros_like(tensor) for key, tensor in state.items()} | {"extra": torch.zeros(1)}
    with pytest.raises(ValueError, match="1 unexpected: extra"):
        load_published(generator, broken)
    assert torch.equal(generator.conv_in.weight, state["all_modules.2.weight"])


def test_misspelled_setting_suggests_the_nearest(golden) -> None:
    settings, state = tiny(golden)
    with pytest.raises(ValueError, match=r"num_res_block is not a published setting.*Did you mean num_res_blocks\?"):
        generator_from(settings | {"num_res_block": 1}, state)
    with pytest.raises(ValueError, match=r"r1_gama is not a published setting.*Did you mean r1_gamma\?"):
        discriminator_from(settings | {"r1_gama": 1}, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resblock_type", "ddpm"),
        ("progressive", "residual"),
        ("fir_kernel", [1, 2, 1]),
        ("embedding_type", "learned"),
        ("centered", False),
    ],
)
def test_unsupported_value_lists_what_is_supported(golden, name: str, value: object) -> None:
    settings, state = tiny(golden)
    with pytest.raises(ValueError, match=rf"{name} is .* but only .* can be built here"):
        generator_from(settings | {name: value}, state)


def test_attention_at_a_side_that_does_not_occur_is_left_out_as_published(golden) -> None:
    settings, state = tiny(golden)
    generator = generator_from(settings | {"attn_resolutions": [8, 4]}, state)
    assert published_names(generator) == published_names(generator_from(settings, state))


def test_settings_of_the_training_are_ignored(golden) -> None:
    settings, state = tiny(golden)
    training = {"batch": 4, "steps": 12, "lr_g": 1e-4, "adam_betas": [0.5, 0.9], "lazy_reg": 3, "num_timesteps": 4}
    assert generator_from(settings | training, state).config == generator_from(settings, state).config


def test_trace_settings_build_both_networks(golden) -> None:
    trace = golden("training_trace")
    for prefix, build in (("sdG/", generator_from), ("sdD/", discriminator_from)):
        state = {key.removeprefix(prefix): tensor for key, tensor in trace.arrays.items() if key.startswith(prefix)}
        loaded = sum(p.numel() for p in build(trace.settings, state).parameters())
        assert loaded == sum(tensor.numel() for tensor in state.values())
