"""All measurements of a GPU, at a tiny size on the CPU: each is written at once, a second start measures the rest."""

import json
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from tests.trainer.bench.in_process import InProcess
from trainer.bench import gpu
from trainer.bench.command import main
from trainer.bench.trial import Ended
from trainer.config.io import load_config
from trainer.config.stages import stages_of


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(gpu, "training_seconds", lambda left_s, runs: 15)
    monkeypatch.setattr(gpu, "NUM_SAMPLES", 16)
    monkeypatch.setattr(gpu, "BATCHES_DRAWN", 1)
    return InProcess(monkeypatch)


def arguments(tiny: tuple[str, ...], out: Path) -> list[str]:
    words = [word for setting in (*tiny, "engine.backend=torch") for word in ("--set", setting)]
    return ["gpu", "--minutes", "60", "--out", str(out), "--config", "digits", *words]


def results(out: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {f"{line['part']} {line['what']}": line for line in lines}


def setting_of(command: str, name: str) -> str:
    return [word for word in shlex.split(command) if word.startswith(f"{name}=")][-1].partition("=")[2]


@pytest.mark.slow
def test_every_part_is_measured_and_a_second_start_has_nothing_left_to_do(tiny, tmp_path, quick, monkeypatch, capsys):
    def short(arguments: list[str]) -> None:
        """Trains for two steps, not for the seconds that a real run has."""
        if arguments[0] == "trainer.worker":
            arguments[:] = [
                "training.total_images=32" if word.startswith("training.total_images") else word for word in arguments
            ]

    call = InProcess.__call__
    monkeypatch.setattr(InProcess, "__call__", lambda self, a, *more: (short(a := list(a)), call(self, a, *more))[1])
    assert main(arguments(tiny, tmp_path)) == 0
    found = results(tmp_path)
    measured = {name.partition(":")[0] for name, line in found.items() if line["report"]}
    assert measured >= {
        "steps eager NCHW fp32, batch 16",
        "steps eager NCHW tf32, batch 16",
        "steps bf16 channels_last, batch 16",
        "steps authors' update, eager NCHW tf32",
        "sampling 64 images",
        "training authors' update, eager NCHW tf32",
    }
    assert [name for name in measured if name.startswith("kernels ")]
    assert {"frechet_ratio", "images", "seconds"} <= found[max(n for n in found if n.startswith("training"))][
        "report"
    ].keys()
    assert all(line["failure"].startswith("skipped") for line in found.values() if not line["report"])
    page = (tmp_path / "results.md").read_text()
    assert "## Steps of digits" in page
    assert "| authors' update, eager NCHW tf32 |" in page
    assert "| 1.00 |" in page  # the baseline in times of itself
    number = len(quick.commands)
    assert main(arguments(tiny, tmp_path)) == 0
    assert len(quick.commands) == number
    assert "(measured before)" in capsys.readouterr().out


def rate(report: float, **more: float) -> Ended:
    found = {"images_per_s": report, "authors_images_per_s": 1.0, "peak_memory_gib": 1.0, "mfu": 0.1}
    return Ended(0, json.dumps(found | {"first_step_s": 1.0} | more), 1.0)


@pytest.mark.slow
def test_batch_is_halved_until_it_fits_and_what_fails_is_a_row_with_its_reason(tiny, tmp_path, quick):
    tried = []

    def made(arguments: list[str]) -> Ended:
        if arguments[1] == "steps" and "--compare-authors-update" not in arguments:
            batch = int(setting_of(shlex.join(arguments), "training.global_batch_size"))
            tried.append(batch)
            return Ended(-9, "", 1.0) if batch > 8 else rate(batch, peak_memory_gib=1e9)
        return Ended(1, "", 1.0)

    quick.fails = made
    assert main(arguments(tiny, tmp_path)) == 0
    found = results(tmp_path)
    assert tried[:3] == [16, 8, 8], "the next row starts from what fitted"
    assert found["steps eager NCHW fp32, batch 16"]["failure"] == "out of memory"
    assert found["steps eager NCHW fp32, batch 8"]["report"]["images_per_s"] == 8
    assert found["sampling 64 images"]["failure"] == "exit code 1, and no message"
    assert found["training quality after equal minutes"]["failure"] == "not reached: the steps were not measured"
    quick.commands.clear()
    assert main(arguments(tiny, tmp_path)) == 0
    again = {command[1] for command in quick.commands}
    assert again == {"steps", "sampling", "kernels"}, "what failed is tried again"
    assert all("--compare-authors-update" in command for command in quick.commands if command[1] == "steps")


@pytest.mark.slow
def test_larger_batch_is_tried_when_half_of_the_memory_is_free(tiny, tmp_path, quick):
    sizes = {"fp32": 100.0, "tf32": 100.0, "bf16": 1.0}
    tried = []

    def made(arguments: list[str]) -> Ended:
        words = shlex.join(arguments)
        if arguments[1] != "steps" or "--compare-authors-update" in arguments:
            return Ended(1, "", 1.0)
        batch, form = (setting_of(words, name) for name in ("training.global_batch_size", "training.precision"))
        tried.append((form, int(batch)))
        fits = form == "bf16" or int(batch) <= 8
        return rate(1.0, peak_memory_gib=1e-3 * sizes[form]) if fits else Ended(-9, "", 1.0)

    quick.fails = made
    assert main(arguments(tiny, tmp_path)) == 0
    assert tried[:2] == [("fp32", 16), ("fp32", 8)]
    assert [batch for form, batch in tried if form == "bf16"][:2] == [8, 16]


@pytest.mark.slow
def test_configs_of_the_same_data_are_trained_for_equal_seconds_and_then_the_baseline(tiny, tmp_path, quick):
    def made(arguments: list[str]) -> Ended:
        if arguments[0] != "trainer.bench":
            return Ended(1, "", 1.0)
        return rate(6.0 if "stackedmnist16" in arguments else 3.0, peak_memory_gib=1e9)

    quick.fails = made
    main([*arguments(tiny, tmp_path), "--config", "stackedmnist16"])
    trained = [shlex.join(command) for command in quick.commands if command[0] == "trainer.worker"]
    batches = [int(setting_of(command, "training.global_batch_size")) for command in trained]
    images = [int(setting_of(command, "training.total_images")) for command in trained]
    assert [command.split()[2] for command in trained] == ["digits", "stackedmnist16", "digits"]
    rates = [3.0, 6.0, 1.0]  # the baseline's is that of the authors' update
    assert images == [round(per_s * 15 / batch) * batch for per_s, batch in zip(rates, batches, strict=True)]
    assert [name for name in results(tmp_path) if name.startswith("training stackedmnist16, ")]


@pytest.mark.slow
def test_run_with_stages_is_trained_with_all_of_them_and_its_baseline_with_the_last_alone(tiny, tmp_path, quick):
    def made(arguments: list[str]) -> Ended:
        return rate(3.0, peak_memory_gib=1e9) if arguments[0] == "trainer.bench" else Ended(1, "", 1.0)

    quick.fails = made
    stages = ("training.total_images=1600", "stages.denoiser.images=1360", "diffusion.num_timesteps=4")
    stages += ("training.learning_rate_g.delay_images=16",)
    given = [word for setting in (*tiny, *stages, "engine.backend=torch") for word in ("--set", setting)]
    words = ["gpu", "--minutes", "60", "--out", str(tmp_path), "--config", "digits-fast", *given]
    assert main(words) == 0
    best, baseline = (command for command in quick.commands if command[0] == "trainer.worker")
    found = [
        stages_of(load_config("digits-fast", [after for word, after in pairwise(command) if word == "--set"]))
        for command in (best, baseline)
    ]
    assert [[stage.name for stage in run] for run in found] == [["denoiser", "last"], [""]]
    assert found[0][0].config.training.total_images == pytest.approx(0.85 * 14 * 16, abs=16)  # too slow for more steps
    assert [name for name in results(tmp_path) if name.endswith("tf32, the last stage alone")]


@pytest.mark.slow
def test_what_is_not_reached_in_time_is_said_and_nothing_measured_ends_with_1(
    tiny, tmp_path, quick, monkeypatch, capsys
):
    monkeypatch.setattr(gpu, "SHORTEST_S", 1e9)
    assert main(arguments(tiny, tmp_path)) == 1
    assert not quick.commands
    printed = capsys.readouterr()
    assert "steps digits eager NCHW fp32, batch 16: not reached: " in printed.out
    assert "nothing could be measured" in printed.err


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tiny, tmp_path, quick, capsys):
    def made(arguments: list[str]) -> Ended:
        if "--compare-authors-update" in arguments:
            raise KeyboardInterrupt
        return rate(3.0, peak_memory_gib=1e9)

    quick.fails = made
    assert main(arguments(tiny, tmp_path)) == 130
    assert "stopped; the same command measures what is missing" in capsys.readouterr().err
    assert results(tmp_path)["steps bf16 channels_last, batch 16"]["report"]["images_per_s"] == 3


@pytest.mark.slow
def test_line_cut_off_by_the_end_of_a_machine_is_measured_again(tiny, tmp_path, quick):
    def made(arguments: list[str]) -> Ended:
        return rate(3.0, peak_memory_gib=1e9) if arguments[0] == "trainer.bench" else Ended(1, "", 1.0)

    quick.fails = made
    main(arguments(tiny, tmp_path))
    file = tmp_path / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if "bf16 channels_last, batch 16" in line)
    file.write_text("".join([*lines[:cut], *lines[cut + 1 :], lines[cut][:30]]))
    quick.commands.clear()
    main(arguments(tiny, tmp_path))
    assert "training.precision=bf16" in quick.commands[0]
    assert len([c for c in quick.commands if c[1] == "steps"]) == 1


def test_numbers_of_the_tests_and_the_names_of_those_that_fail_are_kept(tmp_path, monkeypatch):
    printed = "F\nFAILED tests/a.py::test_b - AssertionError\n1 failed, 12 passed, 3 skipped in 4.00s\n"
    log = tmp_path / "log"
    log.write_text("")
    monkeypatch.setattr(gpu, "run_process", lambda *_: Ended(1, printed, 4.0))
    outcome = gpu.run_tests(["pytest"], 60, log)
    assert outcome.report == {"failed": 1, "passed": 12, "skipped": 3, "failing": "tests/a.py::test_b"}
    assert log.read_text() == printed
