"""One rank of the conformance test: one training step over each engine against plain torch on the whole batch.

Not a test itself: `test_engines.py` runs it with torchrun. Rank 0 prints one JSON object, a row per case.
"""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from models.diffusion import Diffusion, DiffusionConfig
from models.discriminator import Discriminator, DiscriminatorConfig
from models.generator import Generator, GeneratorConfig
from models.resample import ResampleKind
from models.shapes import ImageForm
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.auxiliary import Auxiliary, GradientScale
from trainer.algorithm.losses import OBJECTIVES
from trainer.algorithm.method import Players
from trainer.algorithm.pairs import Conditions, MicroBatch, RawBatch
from trainer.algorithm.randomness import Draws
from trainer.engine.frozen import freeze, learning
from trainer.engine.interface import Engine, EngineConfig, Fragment
from trainer.engine.plain import make_adam
from trainer.engine.ranks import Ranks
from trainer.engine.zero import make_engine

CPU = torch.device("cpu")
GLOBAL_BATCH = 16
PLAIN, GIVEN = ImageForm(16, 1), ImageForm(16, 1, condition_channels=2)
"""Without a condition and with one; the engines are compared with one."""
GAMMA = 2.0
GAMES = {
    "no r1": Adversarial(),
    "r1": Adversarial(r1_gamma=GAMMA),
    "relativistic r1 r2": Adversarial(OBJECTIVES["relativistic"], GAMMA, GAMMA),
    "finite differences": Adversarial(
        OBJECTIVES["relativistic"],
        GAMMA,
        GAMMA,
        penalty="finite_difference",
        penalty_subset=2,
        penalty_epsilon=0.1,  # shorter ones would amplify the rounding of sums in another order
        logit_centring=0.1,
        global_batch_size=GLOBAL_BATCH,
    ),
    "transport": Adversarial(auxiliary=Auxiliary(transport=0.5)),
    "predictions": Adversarial(auxiliary=Auxiliary(afd=0.5, denoising=0.5)),
    "frozen": Adversarial(r1_gamma=GAMMA),
    "haar blocks": Adversarial(),
}


class PlainEngine(Engine):
    """Torch alone, one process, the whole batch: what every engine must equal."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer, self.norm = module, optimizer, torch.zeros(())

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, *, wait: bool = True) -> None:
        self.norm = torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()


def networks(loss: str = "", form: ImageForm = PLAIN) -> tuple[Generator, Discriminator]:
    """The same weights each time. With `frozen` some are frozen, with `predictions` D predicts, and so on."""
    resample = "haar" if loss == "haar blocks" else "fir"
    generator, discriminator = copy.deepcopy(_networks(form, resample, predicts=loss == "predictions"))
    if loss == "frozen":
        freeze(generator, "generator", ["generator.down.*", "*.time.*"])
        freeze(discriminator, "discriminator", ["*.conv1.*"])
    return generator, discriminator


@cache
def _networks(
    form: ImageForm, resample: ResampleKind = "fir", *, predicts: bool = False
) -> tuple[Generator, Discriminator]:
    torch.manual_seed(1)
    generator = Generator(
        GeneratorConfig(
            base_channels=8,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(8,),
            latent_dim=8,
            latent_embedding_dim=16,
            resample=resample,
        ),
        form,
    )
    config = DiscriminatorConfig(base_channels=4, time_embedding_dim=16)
    if predicts:
        config = replace(config, sees="marginal", predicts=("x0", "x_t"))
    discriminator = Discriminator(config, form)
    for network in (generator, discriminator):  # near-zero initial layers would hide errors
        for p in network.parameters():
            p.data.add_(0.05 * torch.randn(p.shape))
    return generator, discriminator


class Accumulator(Engine):
    """An engine that only adds gradients up."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, *, wait: bool = True) -> None: ...


def make_players(bf16: bool = False, gradient_scale: GradientScale | None = None, loss: str = "") -> Players:
    """Players on the small networks whose engines never step."""
    generator, discriminator = (Accumulator(network) for network in networks(loss))  # pyright: ignore[reportAbstractUsage]
    diffusion = Diffusion.from_config(DiffusionConfig(), CPU)
    return Players({"g": generator, "d": discriminator}, diffusion, bf16=bf16, gradient_scale=gradient_scale)


def micro_batches(
    start: int, stop: int, size: int, game: Adversarial | None = None, form: ImageForm = PLAIN
) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (GLOBAL_BATCH, 1, 16, 16), generator=generator, dtype=torch.uint8)
    given = torch.randint(
        0, 256, (GLOBAL_BATCH, form.condition_channels, 16, 16), generator=generator, dtype=torch.uint8
    )
    return [
        (game or Adversarial()).draw(
            RawBatch(
                images[first : first + size],
                Draws(3, 0, torch.arange(first, first + size)),
                latent_dim=8,
                flip=False,
                share=size / GLOBAL_BATCH,
                start=first,
                group_size=4,
                conditions=Conditions(given[first : first + size], 0.25) if form.condition_channels else None,
            ),
            Diffusion.from_config(DiffusionConfig(), CPU),
        )
        for first in range(start, stop, size)
    ]


def optimizer_of(module: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(learning(module), lr=0.1)
    optimizer = make_adam(module, CPU, eps=1e-4)
    optimizer.param_groups[0]["lr"] = 1e-3
    return optimizer


def train_one_step(engines: tuple[Engine, Engine], batches: list[MicroBatch], game: Adversarial, *, world_size: int):
    scale = None
    if game.auxiliary.names:  # then the gradient of the game is normalized, too
        scale = GradientScale()
        scale.load({"mean_square": torch.tensor(0.01, dtype=torch.float64)})
    players = Players(
        {"g": engines[0], "d": engines[1]},
        Diffusion.from_config(DiffusionConfig(), CPU),
        world_size=world_size,
        gradient_scale=scale,
    )
    for part in game.parts:
        game.update(part, players, batches, 0)


def largest_difference(engine: Engine, reference: nn.Module) -> float:
    """Over what this rank holds, partitions included."""
    expected = dict(reference.named_parameters())
    return max(
        (tensor.flatten() - expected[name].detach().flatten()[start : start + tensor.numel()]).abs().max().item()
        for name, start, tensor in engine.live_parameters()
        if tensor.numel()
    )


def cases() -> Iterator[tuple[str, int, int, str, str]]:
    for backend, stage_g, stage_d in (
        ("torch", 0, 0),
        ("deepspeed", 0, 0),
        ("deepspeed", 1, 1),
        ("deepspeed", 2, 2),
        ("deepspeed", 3, 2),
    ):
        for loss in ("no r1", "r1"):
            for kind in ("sgd", "adam"):
                yield backend, stage_g, stage_d, loss, kind
        yield backend, stage_g, stage_d, "relativistic r1 r2", "sgd"
        yield backend, stage_g, stage_d, "finite differences", "sgd"
    for backend, stage_g, stage_d in (("torch", 0, 0), ("deepspeed", 2, 2), ("deepspeed", 3, 2)):
        yield backend, stage_g, stage_d, "transport", "sgd"
        yield backend, stage_g, stage_d, "predictions", "sgd"
    yield "deepspeed", 3, 2, "haar blocks", "sgd"
    for stage_g, stage_d in ((1, 1), (3, 2)):
        yield "deepspeed", stage_g, stage_d, "frozen", "adam"
    for loss in ("no r1", "finite differences", "transport", "predictions"):  # these differentiate D only once
        yield "deepspeed", 3, 3, loss, "sgd"


class Copied:
    """A fragment source over the fragments of all ranks."""

    def __init__(self, fragments: list[Fragment]) -> None:
        self.fragments = fragments

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        out = torch.full((stop - start,), float("nan"))
        for f in self.fragments:
            if f.name == name:
                low, high = max(start, f.start), min(stop, f.start + f.tensors[state].numel())
                if low < high:
                    out[low - start : high - start] = f.tensors[state][low - f.start : high - f.start]
        return out


def gathered(ranks: Ranks, mine: list[Fragment]) -> list[Fragment]:
    """The fragments of all ranks."""
    parts = ranks.gather([(f.name, f.start, f.tensors) for f in mine])
    return [Fragment(name, start, tensors) for part in parts for name, start, tensors in part]


def survives_reload(engine: Engine, ranks: Ranks, fresh: Engine) -> bool:
    """The fragments of all ranks tile the state once, and an engine that loads them is bitwise the same."""
    mine = [Fragment(f.name, f.start, {k: v.clone() for k, v in f.tensors.items()}) for f in engine.fragments()]
    everyone = gathered(ranks, mine)
    fresh.load(Copied(everyone), 1)
    same = all(
        torch.equal(a.tensors[k], b.tensors[k]) for a, b in zip(mine, fresh.fragments(), strict=True) for k in a.tensors
    )
    live = zip(engine.live_parameters(), fresh.live_parameters(), strict=True)
    same = same and all(torch.equal(a[2], b[2]) for a, b in live)
    numels = sum(f.tensors["parameter"].numel() for f in everyone)
    return same and numels == sum(p.numel() for p in networks(form=GIVEN)[0].parameters())


@cache
def references_for(loss: str, kind: str) -> tuple[PlainEngine, PlainEngine]:
    """Both networks after the step of plain torch."""
    made = networks(loss, GIVEN)
    generator, discriminator = (PlainEngine(n, optimizer_of(n, kind)) for n in made)  # pyright: ignore[reportAbstractUsage]
    batches = micro_batches(0, GLOBAL_BATCH, GLOBAL_BATCH, GAMES[loss], GIVEN)
    train_one_step((generator, discriminator), batches, GAMES[loss], world_size=1)
    return generator, discriminator


def main() -> None:
    ranks = Ranks.join("cpu", 60)
    share = GLOBAL_BATCH // ranks.world_size
    mine = (ranks.rank * share, (ranks.rank + 1) * share)
    rows = []
    for backend, stage_g, stage_d, loss, kind in cases():
        game, references = GAMES[loss], references_for(loss, kind)
        plain = [engine.module for engine in references]
        config = EngineConfig(backend=backend, zero_stage_g=stage_g, zero_stage_d=stage_d)  # pyright: ignore

        def build(network: nn.Module, stage: int, kind: str = kind, config: EngineConfig = config) -> Engine:
            return make_engine(network, optimizer_of(network, kind), config, zero_stage=stage, grad_accum_steps=2)

        engines = tuple(build(n, stage) for n, stage in zip(networks(loss, GIVEN), (stage_g, stage_d), strict=True))
        train_one_step(engines, micro_batches(*mine, share // 2, game, GIVEN), game, world_size=ranks.world_size)  # pyright: ignore
        norms = [abs((e.guard.norm / r.norm).item() - 1) for e, r in zip(engines, references, strict=True)]
        row = {
            "case": f"{backend}-g{stage_g}-d{stage_d}-{loss}-{kind}",
            "generator": max(ranks.gather(largest_difference(engines[0], plain[0]))),
            "discriminator": max(ranks.gather(largest_difference(engines[1], plain[1]))),
            "norms": max(norms),
        }
        if kind == "adam":
            fresh = build(networks(loss, GIVEN)[0], stage_g)
            row["reloads"] = all(ranks.gather(survives_reload(engines[0], ranks, fresh)))
            fresh.close()
        rows.append(row)
        for engine in engines:
            engine.close()
    if ranks.rank == 0:
        json.dump(rows, sys.stdout)
    ranks.leave()


if __name__ == "__main__":
    main()
