"""Every engine, ZeRO stage and number of ranks makes the step that plain torch makes on the whole batch."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch

from tests.launch import run_python, run_ranks
from trainer.engine.interface import EngineConfig, even_share
from trainer.engine.plain import make_adam

SCRIPT = Path(__file__).with_name("conformance_rank.py")

# Float32 sums in another order: one SGD step at learning rate 0.1. A wrong reduction is off by 1e-2 and more.
SGD_TOLERANCE = 1e-6
# Adam divides by the root of the squared gradient, which amplifies rounding where gradients are small.
ADAM_TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def rows(request) -> list[dict]:
    done = run_ranks(request.param, [str(SCRIPT)])
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout[done.stdout.index("[{") :])
    print(json.dumps(found, indent=1))  # noqa: T201 - Adam's differences are recorded in docs/experiments.md from here
    # Torch, and four pairs of stages: with and without R1 by SGD and Adam, RpGAN with R1 and R2 by SGD, exact and by
    # finite differences; three of them with the transport loss, and with the losses of D's predictions, both with a
    # normalized gradient, and two with frozen parameters. Stage 3 for both networks with the losses that differentiate
    # once, and for a generator whose levels hand bands of the Haar transform to each other.
    assert len(found) == 43
    return found


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize(("kind", "tolerance"), [("sgd", SGD_TOLERANCE), ("adam", ADAM_TOLERANCE)])
def test_one_step_equals_plain_torch_on_the_whole_batch(rows, kind, tolerance):
    for row in (row for row in rows if row["case"].endswith(kind)):
        assert row["generator"] < tolerance, row
        assert row["discriminator"] < tolerance, row


@pytest.mark.slow
@pytest.mark.multirank
def test_gradient_norms_equal_plain_torch(rows):
    for row in rows:
        assert row["norms"] < 1e-5, row  # relative; float32 sums of squares in another order


@pytest.mark.slow
@pytest.mark.multirank
def test_fragments_tile_the_state_once_and_load_bitwise(rows):
    reloaded = [row for row in rows if "reloads" in row]
    assert len(reloaded) == 12
    for row in reloaded:
        assert row["reloads"], row


def test_even_shares_tile_any_length():
    for numel in (0, 1, 5, 16, 633):
        for world_size in (1, 2, 3, 8):
            shares = [even_share(numel, rank, world_size) for rank in range(world_size)]
            assert shares[0][0] == 0
            assert shares[-1][1] == numel
            assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))


def test_zero_without_deepspeed_is_refused():
    with pytest.raises(ValueError, match="backend torch has no ZeRO"):
        EngineConfig(backend="torch", zero_stage_g=1)


@pytest.mark.slow
def test_a_rank_trains_without_the_libraries_that_it_has_no_use_for():
    """They would be most of the time in which it starts."""
    done = run_python(["-c", PROGRAM])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


PROGRAM = """
import sys
import torch
import trainer.worker
from trainer.engine.interface import EngineConfig
from trainer.engine.plain import make_adam
from trainer.engine.zero import make_engine

torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
for backend in ("torch", "deepspeed"):
    network = torch.nn.Linear(2, 1)
    adam = make_adam(network, torch.device("cpu"))
    engine = make_engine(network, adam, EngineConfig(backend=backend), zero_stage=0, grad_accum_steps=1)
    engine.backward(engine.module(torch.ones(1, 2)).sum())
    engine.step()
    adam.load_state_dict(adam.state_dict())
found = [name for name in ("mlflow", "torchmetrics", "matplotlib", "torch._dynamo") if name in sys.modules]
import mlflow  # it is there, and can be imported after DeepSpeed

print(found)
"""


@pytest.mark.parametrize("is_fresh", [True, False], ids=["fresh", "resumed"])
def test_adam_without_the_compiler_is_torchs_adam_bit_for_bit(is_fresh):
    torch.manual_seed(0)
    networks = [torch.nn.Linear(5, 3) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    ours = make_adam(networks[0], torch.device("cpu"))
    torchs = torch.optim.Adam(networks[1].parameters(), lr=0.0, betas=(0.5, 0.9), fused=True)
    for step in range(4):
        if step == 2 and not is_fresh:
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        x = torch.randn(7, 5)
        for network, optimizer in zip(networks, (ours, torchs), strict=True):
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.equal(a, b)
    assert torch.is_grad_enabled() and all(p.requires_grad for p in networks[0].parameters())
