"""Bad updates are skipped by all ranks alike and leave no trace; good ones are made as ever."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.launch import run_ranks
from trainer.algorithm.adversarial import STATISTICS
from trainer.config.sections import GuardConfig
from trainer.engine.plain import TorchEngine
from trainer.rank.divergence import SkippedUpdates

SCRIPT = Path(__file__).with_name("guard_rank.py")
NAN, INF = float("nan"), float("inf")


def make_engine(fused: bool, max_gradient_norm: float | None = None, grad_accum_steps: int = 1) -> TorchEngine:
    torch.manual_seed(3)
    network = nn.Linear(4, 1)
    # Fused as on a GPU, where torch takes the flag on the device; its kernel for the CPU has the same rules.
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1, fused=fused)
    return TorchEngine(network, optimizer, grad_accum_steps, max_gradient_norm)


def good(network: nn.Module) -> Tensor:
    return network(torch.tensor([[1.0, -2.0, 3.0, 0.5]])).square().sum()


def update(engine: TorchEngine, loss: Tensor) -> None:
    engine.backward(loss)
    engine.step()


def state(engine: TorchEngine) -> dict[str, Tensor]:
    return {f"{f.name}/{k}": v.clone() for f in engine.fragments() for k, v in f.tensors.items()}


BAD = {
    "loss is nan": lambda network: good(network) * NAN,
    "loss is infinite, gradient is not": lambda network: good(network) + INF,
    "gradient is infinite, loss is not": lambda network: good(network) + (next(network.parameters()) * 0).sum().sqrt(),
    "square of the gradient overflows": lambda network: good(network) * 1e30,
}


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("at", [0, 2])
def test_a_bad_update_leaves_parameters_moments_and_count_as_they_were(fused, bad, at):
    spoilt, clean = make_engine(fused), make_engine(fused)
    skipped = []
    for step in range(4):
        if step == at:
            before = state(spoilt)
            update(spoilt, BAD[bad](spoilt.module))
            skipped.append(spoilt.guard.skipped.item())
            assert all(torch.equal(value, before[name]) for name, value in state(spoilt).items())
            assert spoilt.num_updates() == step
        for engine in (spoilt, clean):
            update(engine, good(engine.module))
        skipped.append(spoilt.guard.skipped.item())
    assert skipped == [float(step == at) for step in range(5)]
    assert spoilt.num_updates() == clean.num_updates() == 4
    expected = state(clean)
    for name, value in state(spoilt).items():
        assert torch.equal(value, expected[name]), name


def test_an_unguarded_adam_makes_the_same_updates():
    guarded, plain = make_engine(fused=False), make_engine(fused=False)
    for _ in range(3):
        update(guarded, good(guarded.module))
        good(plain.module).backward()
        plain.optimizer.step()
        plain.optimizer.zero_grad()
    expected = state(plain)
    assert all(torch.equal(value, expected[name]) for name, value in state(guarded).items())


def test_the_verdict_stays_in_its_place_for_updates_that_are_recorded():
    engine = make_engine(fused=True)
    norm, skipped = engine.guard.norm, engine.guard.skipped
    update(engine, good(engine.module))
    assert norm.item() > 0 and skipped.item() == 0
    update(engine, good(engine.module) * NAN)
    assert math.isnan(norm.item()) and skipped.item() == 1


def test_a_gradient_above_the_limit_is_skipped_and_one_at_it_is_not():
    engine = make_engine(fused=False)
    update(engine, good(engine.module))
    norm = engine.guard.norm.item()
    assert norm > 1
    for limit, expected in ((norm, 0.0), (norm * 0.999, 1.0)):
        engine = make_engine(fused=False, max_gradient_norm=limit)
        update(engine, good(engine.module))
        assert engine.guard.skipped.item() == expected
        assert engine.guard.norm.item() == norm


def test_one_bad_micro_batch_spoils_the_update_it_belongs_to_and_no_other():
    engine = make_engine(fused=False, grad_accum_steps=2)
    flags = []
    for losses in ((NAN, 0.0), (0.0, 0.0), (0.0, INF), (0.0, 0.0)):
        for loss in losses:
            update(engine, good(engine.module) + loss)
        flags.append(engine.guard.skipped.item())
    assert flags == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_host_waits_for_no_device():
    device = torch.device("cuda")
    network, x = nn.Linear(4, 1).to(device), torch.ones(1, 4, device=device)
    engine = TorchEngine(network, torch.optim.Adam(network.parameters(), lr=0.1, fused=True), 1, 1e6)
    skipped = SkippedUpdates(GuardConfig(), device, ("d", "g"), STATISTICS)
    before = network.weight.detach().clone()
    for step, factor in enumerate((1.0, NAN)):
        if step:  # the first update allocates Adam's state
            before.copy_(network.weight.detach())
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss = network(x).square().sum() * factor
            update(engine, loss)
            skipped.take_in("g", engine.guard, {"loss_g": loss.detach()})
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(before, network.weight) == bool(step)
    assert skipped.rows()["g"] == 1
    assert engine.num_updates() == 1


@pytest.mark.slow
@pytest.mark.multirank
def test_bad_values_of_one_rank_are_skipped_by_both_at_every_zero_stage_and_a_rollback_replays_bitwise():
    done = run_ranks(2, [str(SCRIPT)])
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout[done.stdout.index("[{") :])
    assert len(rows) == 4
    for row in rows:
        for rank in row["ranks"]:
            assert rank["flags"] == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]], row
            assert rank["updates"] == [2, 2], row
            assert rank["equal"] == [True, True], row
            assert rank["replayed"] == [True, True], row
