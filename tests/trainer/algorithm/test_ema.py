"""The averages against their recursion and their closed form in float64."""

from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from trainer.algorithm.ema import Ema, coefficients_for, power_exponent, power_name
from trainer.engine.plain import TorchEngine

WIDTHS = (0.05, 0.1)


@pytest.fixture
def engine() -> TorchEngine:
    module = nn.Linear(3, 2)
    return TorchEngine(module, torch.optim.SGD(module.parameters(), lr=0.1), 1, max_gradient_norm=None)


def weight_of(engine: TorchEngine) -> torch.Tensor:
    return cast(nn.Linear, engine.module).weight


def walked(engine: TorchEngine, ema: Ema, steps: int) -> torch.Tensor:
    """The weights of each step of a random walk, float64 [steps, 2, 3], which `ema` has averaged."""
    weights = []
    for step in range(steps):
        with torch.no_grad():
            weight_of(engine).add_(torch.randn(2, 3))
        ema.update(step, 0.9)
        weights.append(weight_of(engine).detach().double())
    return torch.stack(weights)


def test_first_update_copies_and_later_ones_follow_the_recursion(engine):
    ema, expected = Ema(engine, WIDTHS), None
    for weight in walked(engine, ema, 5):
        expected = weight if expected is None else 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(ema.full_state()["weight"].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_power_function_weighs_each_step_by_its_share_of_the_integral(engine, width):
    ema, steps = Ema(engine, WIDTHS), np.arange(41)
    weights = walked(engine, ema, 40)
    shares = torch.from_numpy(np.diff((steps / 40) ** (power_exponent(width) + 1)))
    expected = (shares[:, None, None] * weights).sum(0)
    torch.testing.assert_close(ema.full_state(power_name(width))["weight"].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("width", "exponent"), [(0.05, 16.97), (0.1, 6.94), (0.25, 0.7241)])
def test_exponents_are_the_published_ones_and_have_their_width(width, exponent):
    assert power_exponent(width) == pytest.approx(exponent, abs=0.01)
    m = np.linspace(0, 1, 400_001)
    share = m ** power_exponent(width)
    share /= share.sum()
    assert np.sqrt((share * m**2).sum() - (share * m).sum() ** 2) == pytest.approx(width, rel=1e-4)


def test_another_width_is_made_from_the_averages_of_two(engine):
    """24 snapshots of two widths against the average itself."""
    steps, every = 240, 10
    ema, snapshots, kept = Ema(engine, (*WIDTHS, 0.07)), [], []
    with torch.no_grad():
        for step in range(steps):
            weight_of(engine).lerp_(torch.randn(2, 3), 0.02).add_(0.01)
            ema.update(step, 0.9)
            if (step + 1) % every == 0:
                for width in WIDTHS:
                    snapshots.append((width, step + 1))
                    kept.append(ema.full_state(power_name(width))["weight"].double().clone())
    factors, distance = coefficients_for(snapshots, (0.07, steps))
    assert factors.sum() == pytest.approx(1)
    assert distance < 0.01
    made = sum(factor * weight for factor, weight in zip(factors, kept, strict=True))
    direct = ema.full_state(power_name(0.07))["weight"].double()
    assert (made - direct).norm() / direct.norm() < 1e-3


def test_an_average_that_is_there_is_made_from_itself():
    factors, distance = coefficients_for([(0.05, 100), (0.1, 100), (0.05, 50)], (0.1, 100))
    assert factors == pytest.approx([0, 1, 0], abs=1e-6)
    assert distance < 1e-5


def test_average_is_no_alias_of_the_parameters(engine):
    ema = Ema(engine)
    ema.update(0, 0.5)
    before = ema.full_state()["weight"].clone()
    with torch.no_grad():
        engine.module.weight.add_(1.0)
    assert torch.equal(ema.full_state()["weight"], before)


def test_fragments_are_the_whole_averages(engine):
    ema = Ema(engine, WIDTHS)
    ema.update(0, 0.5)
    pieces = {f.name: f for f in ema.fragments()}
    assert pieces.keys() == {"weight", "bias"}
    assert pieces["weight"].tensors.keys() == {"average", "average-0.05", "average-0.1"}
    assert all(torch.equal(x, engine.module.weight.detach().flatten()) for x in pieces["weight"].tensors.values())
