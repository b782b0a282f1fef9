"""What is made of measured times: rounds, clocks and readers with known answers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.trainer.bench.made_time import MadeTime
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.statistics import Statistics
from trainer.bench.steps import timing
from trainer.bench.steps.timing import compare_updates, count_flops, time_rounds, time_steps
from trainer.config.io import load_config

PARTS = ("time/data_s", "time/d_s", "time/g_s", "time/other_s")


def made_rounds(monkeypatch: pytest.MonkeyPatch, *rates: float) -> None:
    """Rounds of these images a second, in each of which the parts of a step take 1, 2, 3 and 4 s in turn."""
    rounds = [
        {"images_per_s": rate, "peak_memory_gib": rate, **{name: i + 1.0 for i, name in enumerate(PARTS)}}
        for rate in rates
    ]
    rounds[0]["first_step_s"] = 12.0
    monkeypatch.setattr(timing, "time_rounds", lambda *_, **__: rounds)


def test_warming_up_does_not_count_and_the_share_of_the_peak_is_work_over_peak(monkeypatch):
    made_rounds(monkeypatch, 1.0, 40.0, 60.0, 50.0)
    monkeypatch.setattr(timing, "matmul_flops_per_s", lambda *_: 400_000.0)
    costs = SimpleNamespace(flops_per_image=2_000)
    monkeypatch.setattr(timing, "count_costs", lambda _: costs)
    found = time_steps(load_config("digits", ["scaling.world_size=1"]))
    assert found["images_per_s"] == 50  # median of 40, 60 and 50
    assert [found[name] for name in PARTS] == [1, 2, 3, 4]
    assert found["flops_per_image"] == 2_000
    assert found["mfu"] == 0.25  # 50 * 2,000 of 400,000
    assert found["peak_memory_gib"] == 50
    assert found["first_step_s"] == 12


def test_updates_that_take_turns_are_told_apart(monkeypatch):
    made_rounds(monkeypatch, 1.0, 1.0, 10.0, 5.0, 20.0, 8.0, 30.0, 10.0)
    found = compare_updates(load_config("digits"))
    assert found == {"images_per_s": 20, "authors_images_per_s": 8, "speedup": 2.5}


def test_each_round_runs_its_own_method_for_all_of_its_steps(tiny, tmp_path):
    called: list[str] = []
    overrides = [*tiny, "engine.backend=torch", "scaling.world_size=1", "tracking.log_interval_steps=2"]
    config = load_config("digits", [*overrides, "training.total_images=96", f"run.directory={tmp_path}"])

    def counted(name: str) -> Adversarial:
        class Counted(Adversarial):
            def update_discriminator(self, *args: Any, **kwargs: Any) -> Statistics:
                called.append(name)
                return super().update_discriminator(*args, **kwargs)

        return Counted.of(config.training, config.generator)

    rounds = time_rounds(config, (counted("ours"), counted("theirs")))
    assert len(rounds) == 3
    assert rounds[0]["first_step_s"] > 0
    assert called == ["ours", "ours", "theirs", "theirs", "ours", "ours"]
    assert not list(tmp_path.iterdir()), "a benchmark keeps nothing"


def test_peak_counts_two_operations_for_each_multiply_add(monkeypatch):
    clock = MadeTime()
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(timing, "_SIZES", {"cpu": 100})
    monkeypatch.setattr(torch, "mm", lambda *_: clock.sleep(0.5))
    assert timing.matmul_flops_per_s(torch.device("cpu"), torch.float32) == 4_000_000


def test_flops_of_a_run_with_stages_are_the_mean_over_its_images(monkeypatch):
    of_stage = {
        "gaussian": SimpleNamespace(flops_per_image=10.0),
        "relativistic": SimpleNamespace(flops_per_image=40.0),
    }
    monkeypatch.setattr(timing, "count_costs", lambda config: of_stage[config.training.objective])
    overrides = ["training.total_images=9600", "stages.denoiser.images=6400"]
    assert count_flops(load_config("digits-fast", overrides)) == pytest.approx(20)
    assert count_flops(load_config("digits")) == 40
