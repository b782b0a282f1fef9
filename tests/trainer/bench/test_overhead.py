"""What everything around the step costs: the same steps bare and whole, in turn."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from data.storage.errors import OperationError
from trainer.bench import overhead
from trainer.bench.overhead import NUM_INTERVALS, summarize, time_pairs, whole_step_s
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig
from trainer.tracking.spool import read_records, spool_path


def settings(tiny: tuple[str, ...]) -> list[str]:
    return [s for s in tiny if not s.startswith(("tracking.", "checkpoint."))]


def test_overhead_is_the_middle_quotient_of_the_pairs():
    pairs = [(1.0, 1.5), (2.0, 2.5), (4.0, 8.0)]
    assert summarize(pairs) == {"bare_step_s": 2.0, "whole_step_s": 2.5, "overhead": 0.5}


def test_first_interval_warms_up_and_slow_ones_count_in_full(monkeypatch):
    rates = [{"images_per_s": rate} for rate in (1.0, 16.0, 32.0, 8.0)]
    monkeypatch.setattr(overhead, "time_rounds", lambda _: rates)
    config = load_config("digits", ["scaling.world_size=1", "training.global_batch_size=16"])
    assert overhead.bare_step_s(config) == pytest.approx((1 + 0.5 + 2) / 3)


def test_bare_and_whole_runs_take_turns_over_the_same_steps(tiny, tmp_path, monkeypatch):
    seen: list[tuple[str, TrainConfig]] = []

    def bare(config: TrainConfig) -> float:
        seen.append(("bare", config))
        return 1.0

    def whole(arguments: list[str], config: TrainConfig) -> float:
        assert load_config(arguments[1], arguments[3::2]) == config  # --config NAME --set X --set Y
        seen.append(("whole", config))
        return 2.0

    monkeypatch.setattr(overhead, "bare_step_s", bare)
    monkeypatch.setattr(overhead, "whole_step_s", whole)
    assert time_pairs("digits", settings(tiny), 20, 2, tmp_path) == [(1.0, 2.0), (1.0, 2.0)]
    assert [name for name, _ in seen] == ["bare", "whole"] * 2
    configs = [config for _, config in seen]
    assert {config.training.total_images for config in configs} == {2 * (NUM_INTERVALS + 1) * 16}
    assert [config.tracking.backends for config in configs] == [(), ("mlflow",)] * 2
    assert len({config.run.directory for config in configs}) == 3  # a whole run would resume the one before


@pytest.mark.slow
def test_whole_run_logs_each_of_its_intervals(tiny, tmp_path, monkeypatch):
    run = subprocess.run

    def without_ray(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[2] == "trainer.run"
        return run([*command[:2], "trainer.worker", *command[3:]], **options)  # one rank, as one plain process

    monkeypatch.setattr(subprocess, "run", without_ray)
    ((bare_s, whole_s),) = time_pairs("digits", settings(tiny), 10, 1, tmp_path)
    assert bare_s > 0 and whole_s > 0
    records = [record for record in read_records(spool_path(tmp_path / "whole-0")) if record.kind == "metrics"]
    assert [record.step for record in records] == list(range(1, NUM_INTERVALS + 2))


@pytest.mark.slow
def test_a_run_that_fails_is_told_with_its_last_words(tmp_path):
    config = load_config("digits", [f"run.directory={tmp_path}"])
    missing = Path(tmp_path / "none.yaml")
    with pytest.raises(OperationError, match=rf"(?s)trainer.run ended with 2: .*{missing}"):
        whole_step_s(["--config", str(missing)], config)
