"""What a DeepSpeed engine changes outside its own network: nothing."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.engine.interface import EngineConfig
from trainer.engine.ranks import Ranks
from trainer.engine.zero import make_engine

pytestmark = pytest.mark.slow  # it imports DeepSpeed


class Network(nn.Module):
    """Notes which linear layer it runs with; fails without an input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.ran_with = nn.Linear(8, 8), None

    def forward(self, x: Tensor | None) -> Tensor:
        self.ran_with = F.linear
        assert x is not None, "no input"
        return self.layer(x)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_engine_leaves_the_linear_layers_of_other_networks_alone(stage):
    plain, other, x = F.linear, nn.Linear(8, 8), torch.randn(4, 6, 8)
    before = other(x)
    ranks = Ranks.join("cpu", 60)
    try:
        network = Network()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        engine = make_engine(network, optimizer, EngineConfig(), zero_stage=stage, grad_accum_steps=1)
        assert F.linear is plain
        engine.backward(engine.module(x).sum())
        engine.step()
        assert (network.ran_with is plain) == (stage < 3)
        assert F.linear is plain
        assert torch.equal(other(x), before)
        with pytest.raises(AssertionError, match="no input"):
            engine.module(None)
        assert F.linear is plain
        engine.close()
    finally:
        ranks.leave()
