"""The check that kills change nothing: it detects differences, and a run that is really killed gives equal results."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.launch import exit_code, run_python
from trainer.checkpoint.fingerprint import Fingerprint
from trainer.rank.fault_injection import Kill
from trainer.verify_resume import KINDS, compare, main, plan_kills

A = Fingerprint(weights="a" * 64, ema="b" * 64, optimizer="c" * 64, metrics="d" * 64)


def test_kills_are_a_function_of_the_seed_and_come_in_the_order_of_the_run():
    plan = list(plan_kills(7, 25, ranks=3, total_steps=100))
    assert plan == list(plan_kills(7, 25, ranks=3, total_steps=100))
    assert plan != list(plan_kills(8, 25, ranks=3, total_steps=100))
    assert [kill.step for kill in plan] == sorted(kill.step for kill in plan)
    assert all(1 <= kill.step <= 100 and 0 <= kill.delay <= 1 for kill in plan)
    assert all(set(kill.ranks) <= {0, 1, 2} and kill.ranks for kill in plan)


def test_every_kind_of_kill_comes_and_a_checkpoint_is_struck_in_several_phases():
    plan = list(plan_kills(0, 50, ranks=2, total_steps=1000))
    assert [kill.signal == "SIGTERM" for kill in plan[:5]] == [kind == "SIGTERM" for kind in KINDS]
    events = [kill.file_event for kill in plan if kill.file_event is not None]
    assert len(events) == 20
    assert len(set(events)) > 5
    assert {len(kill.ranks) for kill in plan} == {1, 2}


def test_a_strike_passes_through_the_command_line_unchanged():
    for kill in plan_kills(3, 10, ranks=4, total_steps=50):
        assert Kill.from_json(kill.to_json()) == kill


def test_table_says_which_part_of_which_step_differs():
    lines, equal = compare({4: A, 8: A}, {4: A, 8: replace(A, ema="x" * 64, metrics="y" * 64)})
    assert not equal
    assert lines[1].split() == ["4", *(letter * 12 for letter in "abcd"), "equal"]
    assert lines[2].endswith("DIFFERENT: ema, metrics")


def test_a_step_that_only_the_killed_run_has_says_nothing_and_a_missing_one_does():
    assert compare({4: A}, {3: A, 4: A})[1]
    lines, equal = compare({4: A, 8: A}, {4: A})
    assert not equal
    assert lines[-1].endswith("DIFFERENT: missing")
    assert not compare({}, {})[1]  # nothing was compared


def arguments(tiny: Sequence[str], out: Path, *more: str) -> list[str]:
    words = [*tiny, *more]
    return ["--config", "digits", *(x for o in words for x in ("--set", o)), "--out", str(out)]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--set", "scaling.device=gpu"], "scaling.device"),
        (["--set", "training.total_imges=3"], "total_images"),
        (["--ranks", "0"], "argument --ranks: '0' is given, allowed is a whole number of 1 or more"),
        (["--kills", "-1"], "argument --kills: '-1' is given, allowed is a whole number of 0 or more"),
    ],
)
def test_what_cannot_be_tried_is_said_with_code_2(tiny, tmp_path, capsys, more, told):
    assert exit_code(main, [*arguments(tiny, tmp_path / "out"), *more]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folder_in_use_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    assert main(arguments(tiny, tmp_path)) == 2
    assert f"--out is {tmp_path}, which is in use" in capsys.readouterr().err


@pytest.mark.slow
def test_start_that_fails_of_itself_is_no_kill(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    wrong = arguments(tiny, tmp_path / "out", "run.init_from=/nowhere.pth")
    done = run_python(["-m", "trainer.verify_resume", *wrong])
    assert done.returncode == 1, done.stderr
    assert "a start of straight exited with code 1" in done.stderr
    assert "/nowhere.pth" in done.stderr


WITH_STATES = (
    "stages={calm: {images: 64, training: {r1_gamma: 0.5}}}",
    "training.power_ema.widths=[0.1]",
    "training.gradient_normalization=true",
    "training.augmentation.adaptive.target=0.01",
)
"""A border between two stages, and all that a game carries from step to step besides the networks."""


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize(
    ("stage_g", "stage_d", "seed", "steps", "more"), [(1, 2, "2", 20, ()), (3, 2, "7", 10, WITH_STATES)]
)
def test_two_ranks_killed_in_a_step_and_in_a_save_are_equal_in_every_checkpoint(
    tiny, tmp_path, stage_g, stage_d, seed, steps, more
):
    sets = (*more, f"engine.zero_stage_g={stage_g}", f"engine.zero_stage_d={stage_d}")
    given = arguments(
        tiny, tmp_path / "out", *sets, f"training.total_images={16 * steps}", "checkpoint.save_interval_steps=2"
    )
    done = run_python(["-m", "trainer.verify_resume", *given, "--kills", "2", "--ranks", "2", "--seed", seed])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(2, steps + 1, 2))
    assert len({row[1] for row in rows}) == steps // 2  # it learnt between the points
    assert f"seed {seed}, 2 ranks, 2 kills: all equal" in done.stdout
    assert re.search(r"from step 0, SIGKILL to .* in step \d+; resumes at step", done.stderr), done.stderr[-3000:]
