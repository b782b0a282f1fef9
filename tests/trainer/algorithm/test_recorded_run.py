"""The algorithm against a recorded training run of the published method, and what each update may and may not touch."""

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.diffusion import Diffusion, DiffusionConfig, forward_pair
from models.published import state_dict as published
from tests.launch import ROOT
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.ema import Ema
from trainer.algorithm.method import Players
from trainer.algorithm.pairs import MicroBatch, Pair
from trainer.engine.interface import Engine, EngineConfig
from trainer.engine.plain import make_adam
from trainer.engine.ranks import Ranks
from trainer.engine.zero import make_engine

TRACE = ROOT / "tests" / "golden" / "training_trace.npz"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trace() -> dict[str, np.ndarray]:
    with np.load(TRACE) as file:
        return dict(file)


@pytest.fixture(scope="module", autouse=True)
def group_of_one():
    ranks = Ranks.join("cpu", 60)
    yield
    ranks.leave()


def _state(trace: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in trace.items() if k.startswith(prefix)}


def _micro_batch(trace: dict[str, np.ndarray], step: int, diffusion: Diffusion) -> MicroBatch:
    def pair(player: str) -> Pair:
        names = ("t", "eps_xtm1", "eps_xt", "z", "eps_posterior")
        t, noise_tm1, noise_t, z, noise = (torch.from_numpy(trace[f"draw/{player}_{name}"][step]) for name in names)
        x0 = torch.from_numpy(trace["draw/x0"][step])
        return Pair(t, *forward_pair(diffusion, x0, t, noise_tm1, noise_t), z, noise)

    return MicroBatch(pair("d"), pair("g"), share=1.0)


class Trained:
    """The recorded run, repeated by our step over one kind of engine."""

    def __init__(self, trace: dict[str, np.ndarray], backend: str, stage_g: int, stage_d: int) -> None:
        settings = json.loads(str(trace["config"]))
        self.settings = settings
        generator = published.generator_from(settings, _state(trace, "sdG/"))
        discriminator = published.discriminator_from(settings, _state(trace, "sdD/")).discriminator
        config = EngineConfig(backend=backend, zero_stage_g=stage_g, zero_stage_d=stage_d)  # pyright: ignore
        beta1, beta2 = settings["adam_betas"]

        def engine(module: nn.Module, stage: int, rate: float) -> Engine:
            made = make_engine(
                module, make_adam(module, CPU, beta1=beta1, beta2=beta2), config, zero_stage=stage, grad_accum_steps=1
            )
            made.set_rates(rate)
            return made

        self.players = Players(
            {
                "g": engine(generator, stage_g, settings["lr_g"]),
                "d": engine(discriminator, stage_d, settings["lr_d"]),
            },
            Diffusion.from_config(DiffusionConfig(num_timesteps=settings["num_timesteps"]), CPU),
        )
        game = Adversarial(r1_gamma=settings["r1_gamma"], penalty_interval_steps=settings["lazy_reg"])
        self.ema = Ema(self.players.generator)
        self.log: list[dict[str, float]] = []
        for step in range(settings["steps"]):
            batch = _micro_batch(trace, step, self.players.diffusion)
            stats = game.update("d", self.players, [batch], step) | game.update("g", self.players, [batch], step)
            self.ema.update(step, settings["ema_decay"])
            self.log.append({k: v.item() for k, v in stats.items() if v.numel() == 1})
        self.r1_gamma = settings["r1_gamma"]

    def weights(self, engine: Engine) -> dict[str, Tensor]:
        """What the engine holds, whole: on one rank each piece is the parameter."""
        return {name: tensor.clone() for name, _, tensor in engine.live_parameters()}


@pytest.fixture(
    scope="module",
    params=[("torch", 0, 0), ("deepspeed", 0, 0), ("deepspeed", 1, 1), ("deepspeed", 2, 2), ("deepspeed", 3, 2)],
    ids=lambda p: f"{p[0]}-g{p[1]}-d{p[2]}",
)
def trained(request, trace):
    run = Trained(trace, *request.param)
    yield run
    run.players.generator.close()
    run.players.discriminator.close()


@pytest.mark.slow
def test_losses_equal_the_recorded_run(trained, trace):
    for name in ("loss_d_real", "loss_d_fake", "loss_g"):
        np.testing.assert_allclose([row[name] for row in trained.log], trace[f"log/{name}"], atol=1e-4, err_msg=name)


def test_r1_is_taken_on_the_recorded_steps_with_the_recorded_weight(trained, trace):
    ours = [0.5 * trained.r1_gamma * row["r1_penalty"] if "r1_penalty" in row else np.nan for row in trained.log]
    np.testing.assert_allclose(ours, trace["log/r1_weighted"], rtol=1e-3)


@pytest.mark.parametrize(("player", "prefix"), [("generator", "endG/"), ("discriminator", "endD/"), ("ema", "ema/")])
def test_end_weights_equal_the_recorded_run(trained, trace, player, prefix):
    state = _state(trace, prefix)
    if player == "discriminator":
        expected: nn.Module = published.discriminator_from(trained.settings, state).discriminator
    else:
        expected = published.generator_from(trained.settings, state)
    ours = trained.ema.full_state() if player == "ema" else trained.weights(getattr(trained.players, player))
    assert ours.keys() == dict(expected.named_parameters()).keys()
    for name, value in expected.named_parameters():
        torch.testing.assert_close(ours[name].flatten(), value.detach().flatten(), atol=1e-4, rtol=0, msg=name)
