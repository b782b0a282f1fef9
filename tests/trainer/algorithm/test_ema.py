"""The average against its recursion in float64."""

import pytest
import torch
from torch import nn

from trainer.algorithm.ema import Ema
from trainer.engine.plain import TorchEngine


@pytest.fixture
def engine() -> TorchEngine:
    module = nn.Linear(3, 2)
    return TorchEngine(module, torch.optim.SGD(module.parameters(), lr=0.1), 1, max_gradient_norm=None)


def test_first_update_copies_and_later_ones_follow_the_recursion(engine):
    ema, expected = Ema(engine), None
    for step in range(5):
        with torch.no_grad():
            engine.module.weight.add_(torch.randn(2, 3))
        ema.update(step, 0.9)
        weight = engine.module.weight.detach().double()
        expected = weight if expected is None else 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(ema.full_state()["weight"].double(), expected, atol=1e-6, rtol=0)


def test_average_is_no_alias_of_the_parameters(engine):
    ema = Ema(engine)
    ema.update(0, 0.5)
    before = ema.full_state()["weight"].clone()
    with torch.no_grad():
        engine.module.weight.add_(1.0)
    assert torch.equal(ema.full_state()["weight"], before)


def test_fragments_are_the_whole_average(engine):
    ema = Ema(engine)
    ema.update(0, 0.5)
    pieces = {f.name: f for f in ema.fragments()}
    assert pieces.keys() == {"weight", "bias"}
    assert torch.equal(pieces["weight"].tensors["average"], engine.module.weight.detach().flatten())
