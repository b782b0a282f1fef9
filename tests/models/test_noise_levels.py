"""Preconditioning against its formula in float64, and what a generator sees of a noise level."""

from dataclasses import replace

import pytest
import torch

from models.generator import Generator, GeneratorConfig
from models.networks.mlp import MlpGenerator
from models.noise_levels import NoiseConditioning, preconditioned
from models.shapes import ImageForm

LEVELS = (0.4, 1.2, 4.0, 80.0)
SMALL = GeneratorConfig(
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(),
    latent_dim=4,
    latent_embedding_dim=8,
    time_embedding="log_sigma",
    output_tanh=False,
    sigma_data=0.5,
)


def made(config: GeneratorConfig = SMALL, levels: tuple[float, ...] = LEVELS) -> Generator | MlpGenerator:
    torch.manual_seed(0)
    kind = MlpGenerator if config.kind == "mlp" else Generator
    generator = kind(config, ImageForm(8, 1), levels)
    for p in generator.parameters():  # near-zero layers would hide what they see
        p.data.add_(0.05 * torch.randn(p.shape))
    return generator


def inputs(batch_size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, 1, 8, 8, generator=generator), torch.zeros(batch_size, 4)


def test_preconditioning_is_edm_in_the_scale_of_x_t():
    output, x0, noise = torch.randn(3, 5, 1, 2, 2, dtype=torch.float64).unbind()
    sigma = torch.tensor([1e-3, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)
    s = sigma[:, None, None, None]
    x = x0 + s * noise
    expected = 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25) ** 0.5 * output
    torch.testing.assert_close(preconditioned(output, x / (1 + s**2) ** 0.5, sigma, 0.5), expected)


@pytest.mark.parametrize("level", [0.01, 0.5, 3.0, 80.0])
def test_target_of_a_preconditioned_network_has_the_variance_1_at_every_level(level):
    """F = (x0 - c_skip x) / c_out for data of deviation sigma_data: what EDM chose c_skip and c_out for."""
    torch.manual_seed(0)
    x0, noise = 0.5 * torch.randn(200_000, dtype=torch.float64), torch.randn(200_000, dtype=torch.float64)
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    sigma = torch.tensor([level], dtype=torch.float64)
    c_out = preconditioned(one, zero, sigma, 0.5).item()
    c_skip = preconditioned(zero, one, sigma, 0.5).item() / (1 + level**2) ** 0.5
    target = (x0 - c_skip * (x0 + level * noise)) / c_out
    assert target.var().item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("kind", ["unet", "mlp"])
def test_a_step_and_its_noise_level_are_the_same_input(kind):
    generator, (x_t, z) = made(replace(SMALL, kind=kind)), inputs()
    by_step = generator(x_t, torch.arange(4), z)
    assert torch.equal(by_step, generator(x_t, torch.tensor(LEVELS), z))
    assert not torch.allclose(by_step, generator(x_t, torch.tensor(LEVELS) * 1.1, z))


@pytest.mark.parametrize("kind", ["unet", "mlp"])
def test_weights_serve_any_number_of_steps(kind):
    config = replace(SMALL, kind=kind)
    four, two = made(config), made(config, (1.2, 80.0))
    two.load_state_dict(four.state_dict())
    x_t, z = inputs(2)
    assert torch.equal(two(x_t, torch.tensor([0, 1]), z), four(x_t, torch.tensor([1, 3]), z))


def test_without_noise_levels_a_network_that_sees_them_is_refused():
    for sees in (replace(SMALL, sigma_data=None), replace(SMALL, time_embedding="positional")):
        with pytest.raises(ValueError, match="built with the levels of its steps"):
            made(sees, ())
    made(replace(SMALL, sigma_data=None, time_embedding="positional"), ())


def test_tanh_of_a_preconditioned_output_is_refused():
    with pytest.raises(ValueError, match="set output_tanh to false, or sigma_data to null"):
        NoiseConditioning(LEVELS, embedded=False, sigma_data=0.5, tanh=True)
