"""One rank of the test of skipped updates: over each engine, bad updates against the same run without them.

Not a test itself: `test_guard.py` runs it with torchrun. Rank 0 prints one JSON object, a row per case.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from models.diffusion import Diffusion, DiffusionConfig
from tests.trainer.engine.conformance_rank import CPU, Copied, gathered, micro_batches, networks, optimizer_of
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.method import Part, Players
from trainer.algorithm.pairs import MicroBatch
from trainer.engine.interface import Engine, EngineConfig, Fragment
from trainer.engine.ranks import Ranks
from trainer.engine.zero import make_engine

LARGEST_NORM = 1e3
# Each stage of each network once.
CASES = (("torch", 0, 0), ("deepspeed", 1, 0), ("deepspeed", 2, 1), ("deepspeed", 3, 2))


def spoiled(batch: MicroBatch, kind: str) -> MicroBatch:
    """What a failing machine makes of a micro-batch."""
    if kind == "large":
        return replace(batch, share=batch.share * 1e9)
    nan = float("nan")
    pair_d = replace(batch.pair_d, x_tm1=torch.full_like(batch.pair_d.x_tm1, nan))
    return replace(batch, pair_d=pair_d, pair_g=replace(batch.pair_g, x_t=torch.full_like(batch.pair_g.x_t, nan)))


def build(stage_g: int, stage_d: int, backend: str) -> Players:
    config = EngineConfig(backend=backend, zero_stage_g=stage_g, zero_stage_d=stage_d)  # pyright: ignore[reportArgumentType]
    generator, discriminator = (
        make_engine(
            network,
            optimizer_of(network, "adam"),
            config,
            zero_stage=stage,
            grad_accum_steps=2,
            max_gradient_norm=LARGEST_NORM,
        )
        for network, stage in zip(networks(), (stage_g, stage_d), strict=True)
    )
    diffusion = Diffusion.from_config(DiffusionConfig(), CPU)
    engines: dict[Part, Engine] = {"g": generator, "d": discriminator}
    return Players(engines, diffusion, world_size=torch.distributed.get_world_size())


def train(players: Players, ranks: Ranks, kinds: Sequence[str]) -> list[list[float]]:
    """One update of both networks for each kind; only the last rank's last micro-batch is ever spoiled.

    Returns:
        The flags of D and G after each.
    """
    share = 16 // ranks.world_size
    flags: list[list[float]] = []
    for kind in kinds:
        batches = micro_batches(ranks.rank * share, (ranks.rank + 1) * share, share // 2)
        if kind != "good" and ranks.rank == ranks.world_size - 1:
            batches[-1] = spoiled(batches[-1], kind)
        for part in ("d", "g"):
            Adversarial().update(part, players, batches, 0)
        flags.append([players.discriminator.guard.skipped.item(), players.generator.guard.skipped.item()])
    return flags


def everything(engine: Engine) -> list[Fragment]:
    return [Fragment(f.name, f.start, {k: v.clone() for k, v in f.tensors.items()}) for f in engine.fragments()]


def same(left: list[Fragment], right: list[Fragment]) -> bool:
    return all(torch.equal(a.tensors[k], b.tensors[k]) for a, b in zip(left, right, strict=True) for k in a.tensors)


def states(players: Players) -> list[list[Fragment]]:
    return [everything(engine) for engine in (players.generator, players.discriminator)]


def go_back(players: Players, ranks: Ranks, saved: list[list[Fragment]], num_updates: int) -> None:
    """What a rollback does, on engines in the middle of a run."""
    for engine, mine in zip((players.generator, players.discriminator), saved, strict=True):
        engine.load(Copied(gathered(ranks, mine)), num_updates)


def main() -> None:
    ranks = Ranks.join("cpu", 60)
    rows = []
    for backend, stage_g, stage_d in CASES:
        spoilt, clean = (build(stage_g, stage_d, backend) for _ in range(2))
        # The first update too: Adam has no state yet.
        flags = train(spoilt, ranks, ["nan", "good", "large", "good"])
        train(clean, ranks, ["good", "good"])
        after = states(spoilt)
        equal = [same(a, b) for a, b in zip(after, states(clean), strict=True)]
        updates = [engine.num_updates() for engine in (spoilt.generator, spoilt.discriminator)]
        train(spoilt, ranks, ["good"])
        once = states(spoilt)
        go_back(spoilt, ranks, after, 2)
        train(spoilt, ranks, ["good"])
        replayed = [same(a, b) for a, b in zip(once, states(spoilt), strict=True)]
        mine = {"flags": flags, "equal": equal, "updates": updates, "replayed": replayed}
        rows.append({"case": f"{backend}-g{stage_g}-d{stage_d}", "ranks": ranks.gather(mine)})
        for players in (spoilt, clean):
            players.generator.close()
            players.discriminator.close()
    if ranks.rank == 0:
        json.dump(rows, sys.stdout)
    ranks.leave()


if __name__ == "__main__":
    main()
