import math

import pytest
import torch
from torch import Tensor, nn

from models.dropout import Dropout, masks_from
from models.layers import (
    NEAR_ZERO,
    Block,
    FourierEmbedding,
    SinusoidalEmbedding,
    TimeEmbedding,
    group_norm,
    initialized,
    recompute_blocks,
)


@pytest.mark.parametrize(("fan", "expected_fan"), [("average", 9 * (32 + 64) / 2), ("out", 9 * 64)])
@pytest.mark.parametrize("scale", [1.0, 0.1, NEAR_ZERO])
def test_weights_are_uniform_with_the_variance_of_the_fan(fan, expected_fan: float, scale: float) -> None:
    torch.manual_seed(0)
    conv = initialized(nn.Conv2d(32, 64, 3), fan=fan, scale=scale)
    limit = math.sqrt(3 * scale / expected_fan)
    assert 0.99 * limit < conv.weight.abs().max().item() <= limit
    # 18,432 draws: the sample variance is within 3% at four sigma
    assert conv.weight.var().item() == pytest.approx(scale / expected_fan, rel=0.03)
    assert conv.bias is not None and not conv.bias.any()


def test_initial_weights_depend_on_the_global_generator_only() -> None:
    def draw() -> torch.Tensor:
        torch.manual_seed(3)
        return initialized(nn.Linear(4, 5)).weight

    assert torch.equal(draw(), draw())


@pytest.mark.parametrize(("num_channels", "num_groups"), [(4, 1), (24, 6), (128, 32), (384, 32), (6, 1)])
def test_group_norm_takes_a_quarter_of_the_channels_up_to_32(num_channels: int, num_groups: int) -> None:
    norm = group_norm(num_channels)
    assert (norm.num_groups, norm.eps) == (num_groups, 1e-6)


@pytest.mark.parametrize("num_channels", [2, 9, 130, 144])
def test_group_norm_refuses_unequal_groups(num_channels: int) -> None:
    with pytest.raises(ValueError, match=rf"{num_channels} channels cannot be split.*choose base_channels"):
        group_norm(num_channels)


def test_sinusoidal_embedding_holds_sines_and_then_cosines() -> None:
    t = torch.tensor([0, 1, 3])
    embedded = SinusoidalEmbedding(6)(t)
    frequencies = torch.tensor([1.0, 1e-2, 1e-4])
    phase = t[:, None] * frequencies
    torch.testing.assert_close(embedded, torch.cat([phase.sin(), phase.cos()], dim=1))


@pytest.mark.parametrize("width", [2, 7])
def test_sinusoidal_embedding_of_odd_width_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=rf"time embedding of width {width}.*even numbers of at least 4"):
        SinusoidalEmbedding(width)


def test_fourier_embedding_is_finite_at_first_step_and_a_part_of_the_state() -> None:
    embedding = FourierEmbedding(4, scale=16.0)
    embedded = embedding(torch.tensor([0, 3]))
    phase = 2 * math.pi * math.log(4) * embedding.frequencies
    torch.testing.assert_close(embedded[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    torch.testing.assert_close(embedded[1], torch.cat([phase.sin(), phase.cos()]))
    assert list(embedding.state_dict()) == ["frequencies"]


def test_time_embedding_computes_in_the_type_of_its_weights() -> None:
    embedding = TimeEmbedding(SinusoidalEmbedding(4), 8, nn.SiLU(), fan="average").double()
    assert embedding(torch.tensor([0, 1])).dtype == torch.float64


class Twice(Block):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), Dropout(0.5), nn.Linear(32, 8), nn.Tanh())
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.layers(x)


def halves(layer: int, shape: tuple[int, ...], probability: float) -> Tensor:
    return (torch.arange(shape[0]) % 2 == 0).expand(4, -1)


@pytest.mark.parametrize("keep", [halves, None])
def test_a_recomputed_block_saves_its_input_alone_and_gives_the_same_bits(keep) -> None:
    network, x = nn.Sequential(Twice(), Twice()), torch.randn(4, 8, requires_grad=True)
    parameters, found, numbers = list(network.parameters()), [], []
    for recomputes in (False, True):
        if recomputes:
            recompute_blocks(network)
        saved: list[Tensor] = []
        torch.manual_seed(1)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)  # noqa: B023
        with hooks, masks_from(network, keep):
            y = network(x)
        numbers.append(len(saved))
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        found.append((y, slope, *torch.autograd.grad(slope.square().sum() + y.sum(), parameters)))
    assert numbers[1] == 2 < numbers[0]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        network(x)
    assert [block.passes for block in network] == [
        1 + 1 + 2 + 1
    ] * 2  # once kept; then for each of two gradients; then none


def test_a_recomputed_block_draws_from_the_global_generator_once() -> None:
    block, states = Twice(), []
    for recomputes in (False, True):
        block.recomputes = recomputes
        torch.manual_seed(1)
        block(torch.ones(4, 8)).sum().backward()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
