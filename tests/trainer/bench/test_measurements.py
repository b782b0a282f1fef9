"""What is made of measured times: rounds, clocks and readers with known answers."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.trainer.bench.made_time import MadeTime
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.statistics import Statistics
from trainer.bench import measurements
from trainer.bench.measurements import compare_updates, time_reading, time_rounds, time_steps
from trainer.config.io import load_config

PARTS = ("time/data_s", "time/d_s", "time/g_s", "time/other_s")


def made_rounds(monkeypatch: pytest.MonkeyPatch, *rates: float) -> None:
    """Rounds of these images a second, in each of which the parts of a step take 1, 2, 3 and 4 s in turn."""
    rounds = [
        {"images_per_s": rate, "peak_memory_gib": rate, **{name: i + 1.0 for i, name in enumerate(PARTS)}}
        for rate in rates
    ]
    rounds[0]["first_step_s"] = 12.0
    monkeypatch.setattr(measurements, "time_rounds", lambda *_, nchw: rounds)


def test_warming_up_does_not_count_and_the_share_of_the_peak_is_work_over_peak(monkeypatch):
    made_rounds(monkeypatch, 1.0, 40.0, 60.0, 50.0)
    monkeypatch.setattr(measurements, "matmul_flops_per_s", lambda *_: 400_000.0)
    costs = SimpleNamespace(flops_per_image=2_000)
    monkeypatch.setattr(measurements, "count_costs", lambda _: costs)
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


@pytest.mark.parametrize(
    ("reading_s", "rate", "share", "longest_s"),
    [
        (0.05, 80.0, 0.0, 0.0),  # a batch takes the device 0.1 s
        (0.2, 40.0, 0.5, 0.1),
    ],
)
def test_waiting_is_what_the_reader_takes_longer_than_the_device(reading_s, rate, share, longest_s, tiny, monkeypatch):
    clock = MadeTime()

    def batches() -> Iterator[SimpleNamespace]:
        while True:
            clock.sleep(reading_s)
            yield SimpleNamespace(images=torch.empty(8))

    monkeypatch.setattr(measurements, "time", clock)
    monkeypatch.setattr(measurements, "open_share", lambda *_, **__: batches())
    found = time_reading(load_config("digits", list(tiny)), images_per_s=80, seconds=100)
    assert found["images_per_s"] == pytest.approx(rate, rel=0.01)
    assert found["waiting_share"] == pytest.approx(share, abs=0.01)
    assert found["longest_wait_s"] == pytest.approx(longest_s, abs=1e-6)


def test_peak_counts_two_operations_for_each_multiply_add(monkeypatch):
    clock = MadeTime()
    monkeypatch.setattr(measurements, "time", clock)
    monkeypatch.setattr(measurements, "_SIZES", {"cpu": 100})
    monkeypatch.setattr(torch, "mm", lambda *_: clock.sleep(0.5))
    assert measurements.matmul_flops_per_s(torch.device("cpu"), torch.float32) == 4_000_000
