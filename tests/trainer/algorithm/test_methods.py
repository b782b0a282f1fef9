"""The methods by name; one that is added needs its own file and a line in the table, and nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from models.generator import GeneratorConfig
from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer.algorithm import methods
from trainer.algorithm.losses import OBJECTIVES
from trainer.algorithm.method import Part, Players
from trainer.algorithm.pairs import RawBatch, to_x0
from trainer.algorithm.statistics import Statistic, Statistics, add_statistics, count, mean
from trainer.config.sections import TrainingConfig
from trainer.config.train_config import TrainConfig


@dataclass(frozen=True)
class Copying:
    """A method of the tests: at t = 0 the generator learns to give back the image that it is shown."""

    parts: tuple[Part, ...] = ("g",)
    statistics: tuple[Statistic, ...] = (
        count("copies"),
        mean("loss_g", over="copies"),
        mean("largest", over="copies", curve="largest_error"),
    )
    penalties: tuple[str, ...] = ()
    penalty_interval_steps: int = 1
    samplers: tuple[str, ...] = ("ancestral",)
    prediction: str = "x0"
    uses_latent: bool = True

    def without_penalties(self) -> "Copying":
        return self

    def starting_at(self, step: int) -> "Copying":
        return self

    def at(self, step: int, part: Part | None = None) -> "Copying":
        return self

    def draw(self, raw: RawBatch, diffusion: Any) -> Any:
        return to_x0(raw.images, None), torch.zeros(len(raw.images), raw.latent_dim), raw.share

    def update(self, part: Part, players: Players, batches: Sequence[Any], step: int = 0) -> Statistics:
        total: Statistics = {}
        for x0, z, share in batches:
            output = players.forward(part)(x0, torch.zeros(len(x0), dtype=torch.int64), z)
            loss = (output - x0).square().mean()
            players.engines[part].backward(loss * (share * players.world_size))
            players.engines[part].step()
            largest = (output - x0).abs().max()
            add_statistics(total, {"loss_g": loss, "largest": largest, "copies": torch.ones_like(loss)}, share)
        return total

    def x0_predictor(self, generator: Callable[..., Any], diffusion: Any) -> Callable[..., Any]:
        return generator


def test_a_method_that_is_added_trains_logs_and_resumes(tiny, tmp_path, monkeypatch):
    # It takes the place of one whose name the config knows: nothing outside of the table goes by the name.
    monkeypatch.setitem(methods.METHODS, "gaussian", lambda settings, generator: Copying())

    def config(name: str) -> TrainConfig:
        more = ("training.objective=gaussian", "training.total_images=64", "training.micro_batch_size=8")
        return configure(tiny, tmp_path / name, *more)

    _, recorder = train(config("whole"))
    curves = recorder.metrics[4]
    assert 0 < curves["loss_g"] < curves["largest_error"] ** 2
    assert curves["skipped_updates_g"] == 0
    assert not [name for name in curves if name.endswith("_d")]
    train(config("parts"), Stopper(2))
    train(config("parts"))
    assert_same_state(state_of(tmp_path / "parts", 4), state_of(tmp_path / "whole", 4))
    assert not [name for name in state_of(tmp_path / "whole", 4) if "discriminator" in name]


def test_every_objective_of_the_config_has_a_method():
    made = methods.make_method(TrainingConfig(total_images=1, global_batch_size=4), GeneratorConfig())
    assert made.parts == ("d", "g")
    assert methods.METHODS.keys() == {*OBJECTIVES, "gaussian"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_penalties_of_a_game_are_those_with_a_weight(objective):
    settings = TrainingConfig(total_images=1, global_batch_size=4, objective=objective, r1_gamma=0.5, r2_gamma=0.0)
    game = methods.make_method(settings, GeneratorConfig())
    assert game.penalties == ("r1",)
    assert game.without_penalties().penalties == ()
