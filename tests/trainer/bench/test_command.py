"""The benchmark of the step and of the pace of the data."""

import json

import pytest

from trainer.bench.command import main
from trainer.config.cost import measure_costs
from trainer.config.io import load_config


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def overrides(tiny: tuple[str, ...], *more: str) -> list[str]:
    return [word for setting in (*tiny, "engine.backend=torch", *more) for word in ("--set", setting)]


def test_parts_of_a_step_add_up_to_its_time(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = report(
        capsys, "--config", "digits", *overrides(tiny, "scaling.world_size=2"), "--rounds", "1", "--steps", "3"
    )
    parts = sum(found[f"time/{part}_s"] for part in ("data", "d", "g", "other"))
    # One rank of two trains on half of the global batch of 16.
    assert 8 / found["images_per_s"] == pytest.approx(parts, rel=0.3)
    assert found["peak_memory_gib"] > 0
    assert list(tmp_path.iterdir()) == [], "a benchmark keeps nothing"


def test_share_of_the_matrix_peak_is_work_times_speed_over_peak(tiny, capsys):
    found = report(capsys, "--config", "digits", *overrides(tiny, "training.r1_interval_steps=4"), "--rounds", "1")
    config = load_config("digits", [*tiny, "scaling.world_size=1", "training.r1_interval_steps=4"])
    assert found["flops_per_image"] == measure_costs(config).flops_per_image(4)
    assert found["mfu"] == found["images_per_s"] * found["flops_per_image"] / found["matmul_flops_per_s"]
    assert 0 < found["mfu"] < 1


def test_update_of_the_authors_takes_turns_and_what_d_learns_is_the_same(tiny, capsys):
    found = report(
        capsys, "--config", "digits", *overrides(tiny), "--compare-authors-update", "--rounds", "1", "--steps", "1"
    )
    assert found["speedup"] == found["images_per_s"] / found["authors_images_per_s"]


@pytest.mark.slow
def test_cpu_is_measured_where_there_is_no_gpu_and_made_images_need_no_data_set(tiny, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    small = overrides(
        (*(s for s in tiny if not s.startswith("data.path")), "data.path=/nowhere"), "data.image_channels=3"
    )
    found = report(capsys, "--config", "cifar10", "--made-images", *small, "--rounds", "1", "--steps", "1")
    assert found["images_per_s"] > 0


def test_images_are_taken_no_faster_than_the_pace(tiny, capsys):
    found = report(capsys, "--config", "digits", *overrides(tiny), "--pace", "100", "--seconds", "1")
    assert 0 < found["images_per_s"] <= 100.1
    assert 0 <= found["longest_wait_s"] < 1
    assert 0 <= found["waiting_share"] < 1


def test_pace_that_no_reader_holds_is_mostly_waiting(tiny, capsys):
    found = report(capsys, "--config", "digits", *overrides(tiny), "--pace", "1000000000", "--seconds", "1")
    assert 100 < found["images_per_s"] < 1_000_000_000
    assert found["waiting_share"] > 0.5


def test_wrong_config_and_missing_data_are_refused_in_words(tiny, tmp_path, capsys):
    assert main(["--config", "digits", *overrides(tiny, f"data.path={tmp_path / 'none'}")]) == 2
    assert "no prepared data set" in capsys.readouterr().err
    assert main(["--config", "digits", "--set", "training.batch=3"]) == 2
    assert "training.batch" in capsys.readouterr().err


def test_config_for_gpus_is_refused_where_there_is_none(tiny, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--config", "digits", *overrides(tiny, "scaling.device=gpu")]) == 2
    assert "scaling.device is gpu, but torch finds none on this machine: set" in capsys.readouterr().err
