"""What a discriminator and a generator's encoder have in common; what is given with an image reaches both."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.discriminator import DiscriminatorConfig
from models.generator import GeneratorConfig
from models.networks import build_discriminator, build_generator, shared_with_encoder
from models.shapes import ImageForm
from models.wavelets import form_in

FORM = ImageForm(32, 3)
G = GeneratorConfig(
    base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(), latent_embedding_dim=16
)
D = DiscriminatorConfig(base_channels=4, time_embedding_dim=16)
OF_PAIRS = ImageForm(16, 1, condition_channels=3)


def networks(base: int, *multipliers: int, of_d: int) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        generator = build_generator(GeneratorConfig(base_channels=base, channel_multipliers=multipliers), FORM)
        return build_discriminator(DiscriminatorConfig(base_channels=of_d), FORM), generator


def twins(shared: dict[str, str]) -> set[tuple[str, str]]:
    return {(own.rpartition(".conv")[0], twin.rpartition(".conv")[0]) for own, twin in shared.items() if ".conv" in own}


def test_blocks_are_matched_in_their_order_by_the_shape_of_their_convolutions():
    discriminator, generator = networks(16, 1, 2, of_d=8)  # D: 16 to 16, 32, 64, 64; G: 16 to 16 thrice, 32 often
    shared = shared_with_encoder(discriminator, generator)
    assert twins(shared) == {("blocks.0", "down.0.blocks.0"), ("blocks.1", "down.1.blocks.0")}
    # The first has no convolution in the generator's shortcut; none of the embedding of the step is taken.
    assert [name for name in shared if "shortcut" in name] == ["blocks.1.shortcut.weight"]
    assert not [name for name in shared if "time" in name]
    own, theirs = dict(discriminator.named_parameters()), dict(generator.named_parameters())
    assert len(shared) == 9 and all(own[name].shape == theirs[twin].shape for name, twin in shared.items())


def test_a_block_of_the_encoder_is_taken_once_and_the_decoder_never():
    discriminator, generator = networks(16, 1, 1, of_d=2)  # D ends with 16 to 16
    assert twins(shared_with_encoder(discriminator, generator)) == {("blocks.3", "down.0.blocks.0")}
    generator.down = nn.ModuleList()
    assert twins(shared_with_encoder(discriminator, generator)) == {("blocks.3", "middle_block1")}
    del generator.middle_block1, generator.middle_block2
    assert not shared_with_encoder(discriminator, generator)


def awakened(network: torch.nn.Module) -> torch.nn.Module:
    """Replace the initial weights, of which many are as good as zero."""
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return network


def given(channels: int = 3) -> torch.Tensor:
    return torch.randn(4, channels, 16, 16)


@pytest.mark.parametrize(
    "more",
    [
        {"progressive_input": "residual"},
        {"progressive_input": "input_skip"},
        {"progressive_input": "input_skip", "progressive_combine": "cat"},
        {"progressive_input": "none", "progressive_output": "output_skip"},
    ],
)
def test_the_condition_steers_the_generator_whose_output_keeps_the_channels_of_an_image(more):
    torch.manual_seed(0)
    network = awakened(build_generator(replace(G, **more), OF_PAIRS))
    x, t, z = torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.int64), torch.randn(4, 100)
    first, second = (network(x, t, z, None, condition) for condition in (given(), given()))
    assert first.shape == x.shape
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("sees", ["pair", "marginal"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_discriminator_judges_an_image_together_with_what_is_given(sees, memory_format):
    torch.manual_seed(0)
    network = awakened(build_discriminator(replace(D, sees=sees), OF_PAIRS))
    network = network.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    x_tm1, x_t = torch.randn(2, 4, 1, 16, 16).unbind()
    t = torch.zeros(4, dtype=torch.int64)
    first, second = (
        network(x_tm1, x_t, t, None, condition.contiguous(memory_format=memory_format))
        for condition in (given(), given())
    )
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_a_network_that_was_built_with_a_condition_needs_it(network):
    x, t = torch.randn(2, 4, 1, 16, 16), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="channels"):
        if network == "generator":
            build_generator(G, OF_PAIRS)(x[0], t, torch.randn(4, 100))
        else:
            build_discriminator(D, OF_PAIRS)(*x, t)


def test_points_have_no_condition():
    with pytest.raises(ValueError, match=r"data\.condition_channels is 3, but generator\.kind is mlp"):
        build_generator(replace(G, kind="mlp"), OF_PAIRS)
    with pytest.raises(ValueError, match=r"data\.condition_channels is 3, but discriminator\.kind is mlp"):
        build_discriminator(replace(D, kind="mlp"), OF_PAIRS)


def test_in_the_haar_domain_the_condition_has_four_times_the_channels_too():
    assert form_in(OF_PAIRS, "haar") == ImageForm(8, 4, condition_channels=12)
