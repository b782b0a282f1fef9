"""What is given with an image reaches both networks, in each architecture."""

from dataclasses import replace

import pytest
import torch

from models.discriminator import DiscriminatorConfig
from models.generator import GeneratorConfig
from models.networks.build import build_discriminator, build_generator, without_values
from models.shapes import ImageForm
from models.wavelets import form_in

G = GeneratorConfig(
    base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(), latent_embedding_dim=16
)
D = DiscriminatorConfig(base_channels=4, time_embedding_dim=16)
FORM = ImageForm(16, 1, condition_channels=3)


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
    network = awakened(build_generator(replace(G, **more), FORM))
    x, t, z = torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.int64), torch.randn(4, 100)
    first, second = (network(x, t, z, None, condition) for condition in (given(), given()))
    assert first.shape == x.shape
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("sees", ["pair", "marginal"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_discriminator_judges_an_image_together_with_what_is_given(sees, memory_format):
    torch.manual_seed(0)
    network = awakened(build_discriminator(replace(D, sees=sees), FORM))
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
            build_generator(G, FORM)(x[0], t, torch.randn(4, 100))
        else:
            build_discriminator(D, FORM)(*x, t)


def test_points_have_no_condition():
    with pytest.raises(ValueError, match=r"data\.condition_channels is 3, but generator\.kind is mlp"):
        build_generator(replace(G, kind="mlp"), FORM)
    with pytest.raises(ValueError, match=r"data\.condition_channels is 3, but discriminator\.kind is mlp"):
        build_discriminator(replace(D, kind="mlp"), FORM)


def test_in_the_haar_domain_the_condition_has_four_times_the_channels_too():
    assert form_in(FORM, "haar") == ImageForm(8, 4, condition_channels=12)


@pytest.mark.parametrize("time_embedding", ["positional", "fourier", "log_sigma"])
@pytest.mark.parametrize("resample", ["fir", "nearest", "haar"])
@pytest.mark.parametrize("kind", ["small", "resnext"])
def test_networks_without_values_have_the_shapes_of_others_and_draw_no_random_number(time_embedding, resample, kind):
    g, d = replace(G, time_embedding=time_embedding, resample=resample), replace(D, kind=kind)

    def shapes(*, are_meta: bool) -> dict[str, torch.Size]:
        networks = torch.nn.ModuleList([build_generator(g, FORM, (0.5, 2.0)), build_discriminator(d, FORM)])
        tensors = {**dict(networks.named_parameters()), **dict(networks.named_buffers())}
        assert {tensor.is_meta for tensor in tensors.values()} == {are_meta}
        return {name: tensor.shape for name, tensor in tensors.items()}

    state = torch.get_rng_state()
    with without_values():
        found = shapes(are_meta=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert shapes(are_meta=False) == found
    assert not torch.equal(torch.get_rng_state(), state)
