"""Perceptrons in the networks' places."""

from dataclasses import replace

import pytest
import torch

from models.discriminator import DiscriminatorConfig
from models.generator import GeneratorConfig
from models.networks.build import build_discriminator, build_generator
from models.networks.mlp import MlpDiscriminator, MlpGenerator, Waves
from models.shapes import ImageForm

G = GeneratorConfig(kind="mlp", base_channels=16, num_res_blocks=2, latent_dim=3, latent_embedding_dim=8)
D = DiscriminatorConfig(kind="mlp", base_channels=16, time_embedding_dim=8)


@pytest.mark.parametrize(("size", "channels"), [(1, 2), (4, 3)])
def test_shapes_are_those_of_the_images(size, channels):
    torch.manual_seed(0)
    generator = build_generator(G, ImageForm(size, channels))
    discriminator = build_discriminator(D, ImageForm(size, channels))
    assert isinstance(generator, MlpGenerator) and isinstance(discriminator, MlpDiscriminator)
    x, t = torch.randn(5, channels, size, size), torch.arange(5)
    x0_pred = generator(x, t, torch.randn(5, 3))
    assert x0_pred.shape == x.shape
    assert x0_pred.abs().max() < 1
    assert discriminator(x0_pred, x, t).shape == (5,)


def test_each_input_matters():
    torch.manual_seed(0)
    generator = build_generator(G, ImageForm(1, 2))
    discriminator = build_discriminator(D, ImageForm(1, 2))
    x, y, t, z = torch.randn(2, 2, 1, 1), torch.randn(2, 2, 1, 1), torch.tensor([0, 3]), torch.randn(2, 3)
    for network, inputs, others in (
        (generator, (x, t, z), (y, t.flip(0), z.flip(0))),
        (discriminator, (x, y, t), (y, x, t.flip(0))),
    ):
        for i, other in enumerate(others):
            changed = tuple(other if j == i else value for j, value in enumerate(inputs))
            assert not torch.allclose(network(*inputs), network(*changed))


def test_a_discriminator_that_sees_the_marginal_is_blind_to_the_noisier_image():
    network = build_discriminator(replace(D, sees="marginal"), ImageForm(1, 2))
    x, y, t = torch.randn(2, 2, 1, 1), torch.randn(2, 2, 1, 1), torch.tensor([0, 3])
    assert torch.equal(network(x, x, t), network(x, y, t))
    assert not torch.equal(network(x, x, t), network(y, x, t))


def test_waves_are_sines_and_cosines_at_doubling_frequencies():
    x = torch.tensor([[0.25, -1.0]])
    waves = Waves()(x)
    assert waves.shape == (1, 2 * Waves.FACTOR)
    torch.testing.assert_close(waves[0, :6], torch.tensor([0.25, -1.0, 0.5**0.5, 0.0, 1.0, 0.0]), atol=1e-6, rtol=0)


def test_discriminator_is_twice_differentiable():
    torch.manual_seed(0)
    network = build_discriminator(D, ImageForm(1, 2)).double()
    x, x_t, t = torch.randn(3, 2, 1, 1).double().requires_grad_(), torch.randn(3, 2, 1, 1).double(), torch.arange(3)
    assert torch.autograd.gradgradcheck(lambda x: network(x, x_t, t), (x,))


def test_points_can_be_predicted_too():
    network = build_discriminator(replace(D, sees="marginal", predicts=("x0", "x_t")), ImageForm(1, 2))
    x_tm1, x_t = torch.randn(2, 4, 2, 1, 1)
    t = torch.arange(4)
    logits, predictions = network(x_tm1, x_t, t, predicting=True)
    assert torch.equal(logits, network(x_tm1, x_t, t)) and [x.shape for x in predictions] == 2 * [(4, 2, 1, 1)]
