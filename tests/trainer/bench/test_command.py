"""The command of all benchmarks: what it hands to each measurement, what it prints, and what it refuses."""

import json
from typing import Any

import pytest

from trainer.bench import command
from trainer.bench.command import main
from trainer.bench.steps.measured import MeasuredPart
from trainer.config.io import dump_config, load_config
from trainer.config.train_config import TrainConfig, num_steps
from trainer.rank.step.graphs import WARM_UP

STAGES = ("stages.denoiser.images=96", "training.learning_rate_g.delay_images=16")


def overrides(tiny: tuple[str, ...], *more: str) -> list[str]:
    return [word for setting in (*tiny, "engine.backend=torch", *more) for word in ("--set", setting)]


def measured(monkeypatch: pytest.MonkeyPatch, name: str) -> list[TrainConfig]:
    """Replace a measurement by one that keeps its configs."""
    seen: list[TrainConfig] = []

    def measure(what: TrainConfig | list[MeasuredPart], *_: object, **__: object) -> dict[str, float]:
        seen.extend([what] if isinstance(what, TrainConfig) else [part.config for part in what])
        return {"images_per_s": 1.5}

    monkeypatch.setattr(command, name, measure)
    return seen


def test_one_rank_of_several_is_measured_with_its_share_in_whole_intervals_of_r1(tiny, monkeypatch, capsys):
    (seen,) = [measured(monkeypatch, "time_run")]
    more = ("scaling.world_size=2", "training.r1_interval_steps=4", "tracking.backends=[mlflow]")
    assert main(["steps", "--config", "digits", *overrides(tiny, *more), "--rounds", "2", "--json"]) == 0
    (config,) = seen
    assert (config.scaling.world_size, config.training.global_batch_size) == (1, 8)
    assert (config.tracking.log_interval_steps, num_steps(config)) == (4, 12)  # one round more, to warm up
    assert config.tracking.backends == ()
    assert json.loads(capsys.readouterr().out) == {"images_per_s": 1.5}


@pytest.mark.parametrize(("interval", "steps"), [(1, 4), (2, 8), (4, 8), (5, 5), (15, 15)])
def test_first_round_is_long_enough_to_record_cuda_graphs(tiny, monkeypatch, interval, steps):
    seen = measured(monkeypatch, "time_run")
    more = ("engine.cuda_graphs=true", f"training.r1_interval_steps={interval}")
    assert main(["steps", "--config", "digits", *overrides(tiny, *more)]) == 0
    assert seen[0].tracking.log_interval_steps == steps
    calm = [step for step in range(steps) if step % interval] or range(steps)  # with R1 in each step, G alone
    assert len(calm) > WARM_UP


def test_authors_update_is_compared_in_fp32_on_plain_engines_over_twice_the_rounds(tiny, monkeypatch, capsys):
    seen = measured(monkeypatch, "compare_updates")
    arguments = ["--config", "digits", *overrides(tiny, "engine.backend=deepspeed", "engine.zero_stage_d=1")]
    assert main(["steps", *arguments, "--compare-authors-update", "--rounds", "1", "--steps", "3"]) == 0
    (config,) = seen
    assert (config.engine.backend, config.engine.zero_stage_d, config.training.precision) == ("torch", 0, "fp32")
    assert num_steps(config) == 12
    assert capsys.readouterr().out == "images_per_s  1.5\n"


@pytest.mark.slow
def test_steps_are_really_made_and_timed(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["steps", "--config", "digits", *overrides(tiny), "--rounds", "1", "--steps", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"images_per_s", "time/d_s", "time/g_s", "peak_memory_gib", "mfu"} <= found.keys()
    assert 0 < found["mfu"] < 1
    assert list(tmp_path.iterdir()) == [], "a benchmark keeps nothing"


@pytest.mark.slow
def test_each_stage_of_a_run_is_measured_and_another_config_in_turns(tiny, capsys):
    small = (*tiny, "diffusion.num_timesteps=4", "training.ema_half_life_images=8", *STAGES)
    words = ["--config", "digits-fast", *overrides(small), "--rounds", "1", "--steps", "1", "--json"]
    assert main(["steps", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    slower, faster = sorted([found["denoiser/images_per_s"], found["last/images_per_s"]])
    assert slower < found["images_per_s"] < faster
    assert min(found["time/d_s"], found["time/g_s"]) > 0
    assert main(["steps", *words, "--baseline", "digits-fast"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["speedup"] == pytest.approx(found["images_per_s"] / found["baseline_images_per_s"])


@pytest.mark.parametrize("name", ["kernels", "sampling", "pace"])
def test_of_a_run_with_stages_the_last_one_is_measured(name, tiny, monkeypatch):
    measurement, more = {
        "kernels": ("heaviest_kernels", []),
        "sampling": ("time_sampling", ["--num", "1"]),
        "pace": ("time_reading", ["--images-per-s", "1"]),
    }[name]
    seen = measured(monkeypatch, measurement)
    assert (
        main([name, "--config", "digits-fast", *overrides((*tiny, "diffusion.num_timesteps=4", *STAGES)), *more]) == 0
    )
    assert [(config.training.objective, config.stages) for config in seen] == [("non_saturating", {})]


@pytest.mark.slow
def test_heaviest_kernels_come_first_with_their_share_of_the_step(tiny, capsys):
    assert main(["kernels", "--config", "digits", *overrides(tiny), "--top", "3", "--json"]) == 0
    seconds, *shares = json.loads(capsys.readouterr().out).values()
    assert len(shares) == 3
    assert sorted(shares, reverse=True) == shares
    assert 0 < sum(shares) < 1
    assert seconds > 0


@pytest.mark.slow
def test_cpu_is_measured_where_there_is_no_gpu_and_made_images_need_no_data_set(tiny, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    seen = measured(monkeypatch, "time_reading")
    small = overrides(
        (*(s for s in tiny if not s.startswith("data.path")), "data.path=/nowhere"), "data.image_channels=3"
    )
    assert main(["pace", "--config", "cifar10", "--images-per-s", "5", "--made-images", *small]) == 0
    (config,) = seen
    assert config.scaling.device == "cpu"
    assert config.data.path != "/nowhere"


def test_images_are_drawn_until_there_are_enough(tiny, capsys):
    assert main(["sampling", "--config", "digits", *overrides(tiny), "--num", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"sampled_images_per_s"}


@pytest.mark.slow
def test_bytes_are_counted_by_kind_without_data_or_device(capsys):
    arguments = ["bytes", "--config", "gaussians25", "--set", "scaling.device=gpu", "--set", "data.path=no/such"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    whole, fused = report.pop("sum"), report.pop("fused")
    del report["g_alone"]
    assert fused["step"] <= whole["step"]
    assert whole["step"] == pytest.approx(sum(row["step"] for row in report.values()))
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("GB (10^9 bytes) that one rank moves in a step of 128 images in bf16")
    assert {len(line) for line in lines[1:-4]} == {len(lines[1])}


def test_wrong_config_and_missing_data_are_refused_in_words(tiny, tmp_path, capsys):
    for name in ("steps", "overhead"):
        assert main([name, "--config", "digits", *overrides(tiny, f"data.path={tmp_path / 'none'}")]) == 2
        assert "no prepared data set" in capsys.readouterr().err
    assert main(["steps", "--config", "digits", "--set", "training.batch=3"]) == 2
    assert "training.batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--set", "run.deterministic=true"), "run.deterministic is True, but False in the baseline"),
        (("--flops-per-image", "3"), "--flops-per-image is for mfu, which a comparison does not measure"),
    ],
)
def test_comparison_that_one_process_cannot_make_is_refused(more, words, tiny, tmp_path, monkeypatch, capsys):
    other = load_config("digits", [*tiny, f"run.directory={tmp_path}"])
    (tmp_path / "other.yaml").write_text(dump_config(other))
    real = command.measured_parts
    given = ["--config", "digits", "--baseline", str(tmp_path / "other.yaml"), *overrides(tiny), *more]

    def each_with_its_own(name: str, settings: list[str], *rest: Any) -> list[MeasuredPart]:
        return real(name, [] if name.endswith(".yaml") else settings, *rest)

    monkeypatch.setattr(command, "measured_parts", each_with_its_own)
    assert main(["steps", *given]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["steps", "overhead"])
def test_config_for_gpus_is_refused_where_there_is_none(name, tiny, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings = [s for s in tiny if not s.startswith(("tracking.", "checkpoint."))]
    assert main([name, "--config", "digits", *overrides(tuple(settings), "scaling.device=gpu")]) == 2
    assert "scaling.device is gpu, but torch finds none on this machine: set" in capsys.readouterr().err


def test_former_command_without_a_subcommand_is_told_to_name_a_measurement(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--config", "digits", "--pace", "100"])
    assert ended.value.code == 2
    words = "the measurement is missing: name one before --config; allowed are "
    words += "steps, sampling, kernels, pace, overhead, checkpoint, bytes, penalties, gpu"
    assert words in capsys.readouterr().err
