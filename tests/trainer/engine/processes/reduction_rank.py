"""One rank of two in one step of each engine with small buckets: what rank 0's trace shows, and the bits of the result.

Not a test itself: `test_reduction.py` runs it with torchrun. Rank 1 starts D's backward pass only after rank 0 has
entered G's forward pass of G's update, so the step would hang if that forward pass waited for D's reduction.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from tests.trainer.engine.conformance_rank import (
    GAMES,
    GLOBAL_BATCH,
    micro_batches,
    networks,
    optimizer_of,
    train_one_step,
)
from trainer.engine import reduction
from trainer.engine.interface import Engine, EngineConfig
from trainer.engine.plain import TorchEngine
from trainer.engine.ranks import Ranks
from trainer.engine.zero import make_engine

ENTERED, BACKWARD_D = "G's forward pass", "D's backward pass"


class OneReduction(TorchEngine):
    """The gradients in one buffer, reduced after the backward pass."""

    def step(self, *, wait: bool = True) -> None:
        self._num_backwards = 0
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for g, piece in zip(
            gradients, (flat / dist.get_world_size()).split([g.numel() for g in gradients]), strict=True
        ):
            g.copy_(piece.view_as(g))
        self._reducer.launch_rest()  # nothing is left to launch
        self.finish()

    def backward(self, loss: torch.Tensor) -> None:
        self.guard.see(loss)
        loss.backward()


def gate(engines: tuple[Engine, Engine], rank: int, store: dist.Store, key: str) -> None:
    """Hold rank 1 back before D's backward pass until rank 0 is in G's forward pass with gradients."""
    generator, discriminator = engines
    forward, backward = generator.module.forward, discriminator.backward

    def announced(*inputs: object) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        if rank == 0:
            store.set(key, "entered")
        with record_function(ENTERED):
            return forward(*inputs)

    def held_back(loss: torch.Tensor) -> None:
        if rank == 1:
            store.wait([key])
        with record_function(BACKWARD_D):
            backward(loss)

    generator.module.forward, discriminator.backward = announced, held_back  # pyright: ignore[reportAttributeAccessIssue]


def state(engines: tuple[Engine, Engine]) -> list[torch.Tensor]:
    return [tensor.clone() for engine in engines for _, _, tensor in engine.live_parameters()]


def main() -> None:
    ranks = Ranks.join("cpu", 60)
    share = GLOBAL_BATCH // ranks.world_size
    batches = micro_batches(ranks.rank * share, (ranks.rank + 1) * share, share)
    store = dist.distributed_c10d._get_default_store()

    def trained(make, key: str | None = None) -> tuple[list[torch.Tensor], profile]:
        engines: tuple[Engine, Engine] = tuple(make(network) for network in networks())  # pyright: ignore
        if key:
            gate(engines, ranks.rank, store, key)
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            train_one_step(engines, batches, GAMES["r1"], world_size=ranks.world_size)
            for engine in engines:
                engine.finish()
        found = state(engines)
        for engine in engines:
            engine.close()
        return found, trace

    def one(network: nn.Module) -> Engine:
        return OneReduction(network, optimizer_of(network, "adam"), 1, None)

    expected, _ = trained(one)
    reduction.BUCKET_BYTES = 4096
    rows = {}
    for backend in ("torch", "deepspeed"):

        def in_buckets(network: nn.Module, backend=backend) -> Engine:
            config = EngineConfig(backend=backend)  # pyright: ignore[reportArgumentType]
            return make_engine(network, optimizer_of(network, "adam"), config, zero_stage=0, grad_accum_steps=1)

        found, trace = trained(in_buckets, key=backend)
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in trace.events() or []]
        backward_d = next(span for span in spans if span[0] == BACKWARD_D)
        entered = next(span for span in spans if span[0] == ENTERED)
        # Launched by the backward pass; gloo's own threads run them, when they come to it.
        launched = [span for span in spans if span[0] == "c10d::allreduce_" and span[1] < entered[1]]
        ran = sorted(span[1:] for span in spans if span[0] == "gloo:all_reduce")[: len(launched)]
        rows[backend] = {
            "same": all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)),
            "reductions_d": len(launched),
            "first_starts_within_backward": backward_d[1] < launched[0][1] < backward_d[2],
            "backward_ops_after_first": sum(
                name.startswith("aten::convolution_backward") and start > launched[0][1] and end <= backward_d[2]
                for name, start, end in spans
            ),
            "last_ends_after_forward_began": max(end for _, end in ran) > entered[1],
        }
    if ranks.rank == 0:
        json.dump(rows, sys.stdout)
    ranks.leave()


if __name__ == "__main__":
    main()
