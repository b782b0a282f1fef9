"""Compiled networks compute what the networks compute, and are left out where they must be."""

import re

import pytest
import torch
from functorch.compile import nop
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from models.layers import recompute_blocks
from tests.launch import run_python
from tests.trainer.engine.conformance_rank import make_players, micro_batches, networks
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.method import Players
from trainer.engine.compile_cache import CompileCache
from trainer.engine.compiled import CompiledForward, compiled_forward

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def compare(device: str, backend: str) -> tuple[float, str]:
    """Largest relative difference between compiled and plain networks, and the rest of what the program says."""
    done = run_python(["-m", "tests.trainer.engine.processes.compiled_networks", device, backend])
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"difference (\S+), (.*), compared \d\d+", done.stdout)
    assert found, done.stdout
    return float(found[1]), found[2]


@pytest.mark.slow
def test_captured_networks_compute_what_the_networks_compute_with_one_graph_for_each_kind_of_block():
    """As the compiler sees them: its own kernels take minutes on a small machine, and are for a GPU."""
    difference, rest = compare("cpu", "aot_eager")
    assert difference < 1e-4
    assert rest == "graph breaks 0, failed 0, graphs 14 of 17 blocks"


@pytest.mark.gpu
@GPU
def test_compiled_networks_on_a_gpu_compute_what_the_networks_compute():
    difference, rest = compare("cuda", "inductor")
    assert difference < 1e-3
    assert rest == "graph breaks 0, failed 0, graphs 14 of 17 blocks"


def fail(*_):
    raise RuntimeError("no compiler is installed")


def fail_in_backward(module: torch.fx.GraphModule, inputs: list[Tensor]):
    return aot_autograd(fw_compiler=nop, bw_compiler=fail)(module, inputs)


@pytest.mark.parametrize("backend", [fail, fail_in_backward])
def test_a_compiler_that_fails_is_named_once_and_the_network_runs_uncompiled(caplog, backend):
    torch._dynamo.reset()
    module = nn.Conv2d(3, 3, 1)
    network = CompiledForward(module, backend=backend)
    x = torch.randn(1, 3, 4, 4)
    for _ in range(2):
        y = network(x)
        assert torch.equal(y, module(x))
        y.sum().backward()
    said = [record.getMessage() for record in caplog.records if record.name == "trainer.engine.compiled"]
    assert ["torch.compile failed" in line for line in said] == [True]


class Counted:
    """A compiled pass that counts its calls, and those with an input that is to be differentiated."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.calls, self.differentiated = module, 0, 0

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        self.calls += 1
        self.differentiated += any(x is not None and x.is_leaf and x.requires_grad for x in inputs)
        return self.module(*inputs)


@pytest.mark.parametrize(("r1_gamma", "r2_gamma", "calls"), [(0.0, 0.0, 2), (1.0, 0.0, 1), (1.0, 1.0, 0)])
def test_what_a_penalty_differentiates_goes_past_the_compiled_discriminator(r1_gamma, r2_gamma, calls):
    plain = make_players()
    counted = [Counted(plain.generator.module), Counted(plain.discriminator.module)]
    players = Players(plain.engines, plain.diffusion, compiled={"g": counted[0], "d": counted[1]})
    game = Adversarial(r1_gamma=1.0, r2_gamma=1.0)
    (batch,) = micro_batches(0, 8, 8)
    game.update_discriminator(players, [batch], r1_gamma=r1_gamma, r2_gamma=r2_gamma)
    assert (counted[0].calls, counted[1].calls, counted[1].differentiated) == (1, calls, 0)
    game.update_generator(players, [batch])
    assert (counted[0].calls, counted[1].calls) == (2, calls + 1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


class Chain(nn.Module):
    """A first layer, then four blocks of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.narrow, self.wide = (nn.Sequential(Block(width), Block(width)) for width in (3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.cat((self.narrow(self.first(x)), self.first(x)), dim=1))


def test_blocks_of_one_shape_share_a_graph_and_are_plain_outside_of_the_compiled_pass():
    torch._dynamo.reset()
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]):
        graphs.append(graph)
        return graph

    network = Chain()
    blocks = [*network.narrow, *network.wide]
    compiled = CompiledForward(network, blocks, backend=counting)
    x = torch.randn(2, 3)
    for _ in range(3):
        assert torch.equal(compiled(x), network(x))
    assert len(graphs) == 2
    assert not any("forward" in vars(block) for block in blocks)
    with torch.no_grad():
        compiled(x)
    assert len(graphs) == 4
    # A hook that waits for a parameter's gradient, as the engines have, interrupts nothing.
    fired = []
    for p in network.parameters():
        p.register_post_accumulate_grad_hook(lambda p: fired.append(p))
    compiled(x).sum().backward()
    assert len(fired) == 10
    (slope,) = torch.autograd.grad(network(x.requires_grad_()).sum(), x, create_graph=True)
    slope.square().sum().backward()  # through the plain network, as R1


@pytest.mark.parametrize(
    ("change", "reason"), [({}, "it needs a GPU and triton"), ({"zero_stage": 3}, "at ZeRO stage 3")]
)
def test_a_network_that_cannot_be_compiled_is_named_with_the_reason(caplog, monkeypatch, tmp_path, change, reason):
    caplog.set_level("INFO")
    if change:
        monkeypatch.setattr("trainer.engine.compiled.can_compile", lambda _: True)
    cache = CompileCache(str(tmp_path), torch.device("cpu"))
    assert compiled_forward(networks()[0], cache, **({"zero_stage": 0} | change)) is None
    assert f"engine.compile has no effect on the generator: {reason}" in caplog.text


def test_a_network_that_recomputes_its_blocks_is_not_compiled(caplog, monkeypatch, tmp_path):
    caplog.set_level("INFO")
    monkeypatch.setattr("trainer.engine.compiled.can_compile", lambda _: True)
    generator, _ = networks()
    recompute_blocks(generator)
    assert compiled_forward(generator, CompileCache(str(tmp_path), torch.device("cpu")), zero_stage=0) is None
    assert "no effect on the generator: with engine.checkpoint_activations" in caplog.text


@pytest.mark.gpu
@GPU
def test_a_gpu_compiles(tmp_path):
    device = torch.device("cuda")
    assert compiled_forward(networks()[0].to(device), CompileCache(str(tmp_path), device), zero_stage=0) is not None
