"""What is made of the speeds of stages, with made speeds."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.bench.steps import stages
from trainer.bench.steps.measured import MeasuredPart
from trainer.bench.steps.stages import compare_runs, time_run


@pytest.fixture(autouse=True)
def _made_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each config is the report of its own measurement, or several in turn."""
    monkeypatch.setattr(stages, "joined", lambda config: nullcontext(SimpleNamespace()))
    monkeypatch.setattr(stages, "time_steps", lambda report, *_, **__: report)


def report(rate: float, flops: float = 1.0, **more: float) -> dict[str, float]:
    constants = {"first_step_s": rate, "peak_memory_gib": rate, "matmul_flops_per_s": 1_000.0, "time/g_s": 1 / rate}
    return {"images_per_s": rate, "flops_per_image": flops, "mfu": 0.5, **constants, **more}


def part(name: str, share: float, config: Any) -> MeasuredPart:
    return MeasuredPart(name=name, share=share, config=config)


def test_run_of_one_stage_is_measured_as_that_stage():
    assert time_run([part("", 1.0, report(3.0))]) == report(3.0)


def test_rate_of_a_run_is_its_images_over_the_time_of_all_stages():
    found = time_run(
        [part("denoiser", 0.75, report(30.0, 4.0)), part("last", 0.25, report(10.0, 20.0, **{"time/d_s": 2.0}))]
    )
    assert found["images_per_s"] == pytest.approx(20)  # 3 images in 0.1 s, and 1 in 0.1 s
    assert (found["denoiser/images_per_s"], found["last/images_per_s"]) == (30, 10)
    assert found["flops_per_image"] == 8
    assert found["mfu"] == pytest.approx(20 * 8 / 1_000)
    assert found["time/d_s"] == 0.5  # a denoiser has no update of D
    assert found["time/g_s"] == pytest.approx(0.75 / 30 + 0.25 / 10)
    assert (found["first_step_s"], found["peak_memory_gib"]) == (30, 30)


def test_two_runs_take_turns_and_the_speedup_is_the_median_of_the_turns(monkeypatch):
    rates, order = {"ours": iter([4.0, 6.0, 9.0]), "theirs": iter([2.0, 2.0, 6.0])}, []

    def measure(name: str, *_: object, **__: object) -> dict[str, float]:
        order.append(name)
        return report(next(rates[name]))

    monkeypatch.setattr(stages, "time_steps", measure)
    found = compare_runs([part("", 1.0, "ours")], [part("", 1.0, "theirs")], turns=3)
    assert found == {"images_per_s": 6, "baseline_images_per_s": 2, "speedup": 2}
    assert order == ["ours", "theirs"] * 3
