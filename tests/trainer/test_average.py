"""Averages of any width from a run that kept some."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer import average
from trainer.checkpoint.resume import Resume, choose
from trainer.sample import command as sample_command

SETS = (
    "training.power_ema.widths=[0.05, 0.1, 0.07]",
    "training.power_ema.interval_images=32",
    "training.total_images=640",
    "stages={before: {images: 64, training: {r1_gamma: 0.5}}}",
)
"""4 steps, then 36; every second one leaves averages."""


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("averages") / "run"
    train(configure(tiny, directory, *SETS))
    return directory


@pytest.fixture
def without_one(run, tmp_path) -> Path:
    """The run as if it had kept two widths."""
    copy = shutil.copytree(run, tmp_path / "run")
    for file in copy.glob("averages/*/width-0.07.safetensors"):
        file.unlink()
    return copy


@pytest.mark.slow
def test_another_width_is_that_of_a_run_that_kept_it(run, without_one, tmp_path, capsys):
    assert average.main(["--run", str(without_one), "--width", "0.07", "--out", str(tmp_path / "made")]) == 0
    # 18 times of the second stage; those of the first one are of other weights.
    assert "width 0.07 at step 40, from 36 averages" in capsys.readouterr().out
    made = load_file(tmp_path / "made" / "generator.safetensors")
    direct = load_file(run / "averages/step-00000040/width-0.07.safetensors")
    assert made.keys() == direct.keys()
    distance = sum((made[name] - x).square().sum() for name, x in direct.items())
    assert distance**0.5 / sum(x.square().sum() for x in direct.values()) ** 0.5 < 1e-2


def test_it_is_a_snapshot_that_images_are_drawn_from(without_one, tmp_path):
    assert average.main(["--run", str(without_one), "--width", "0.08", "--step", "20"]) == 0
    snapshot = without_one / "snapshots/step-00000020-width-0.08"
    out = tmp_path / "grid.png"
    assert sample_command.main(["--run", str(snapshot), "--num", "4", "--out", str(out)]) == 0
    assert out.exists()


@pytest.mark.slow
def test_a_stopped_run_leaves_the_averages_of_an_undisturbed_one(run, tiny, tmp_path):
    for stop in (3, 4, 17):
        train(configure(tiny, tmp_path, *SETS), Stopper(at=stop))
    assert train(configure(tiny, tmp_path, *SETS))[0].finished
    assert_same_state(state_of(tmp_path, 40), state_of(run, 40))
    files = sorted(file.relative_to(run) for file in run.glob("averages/*/*.safetensors"))
    assert len(files) == 3 * 20
    for file in files:
        assert_same_state(load_file(tmp_path / file), load_file(run / file))


@pytest.mark.parametrize("width", ["0.3", "0.001", "x", "nan"])
def test_a_width_that_is_none_is_refused(run, width, capsys):
    with pytest.raises(SystemExit) as ended:
        average.main(["--run", str(run), "--width", width])
    assert ended.value.code == 2
    assert f"{width} is not a width; allowed: 0.01 to 0.28, such as 0.07" in capsys.readouterr().err


def test_a_run_without_averages_is_told_how_to_have_some(tmp_path, capsys):
    assert average.main(["--run", str(tmp_path), "--width", "0.07"]) == 2
    assert "train with training.power_ema.widths, such as [0.05, 0.1]" in capsys.readouterr().err


def test_a_step_without_averages_and_a_taken_folder_are_refused(run, tmp_path, capsys):
    assert average.main(["--run", str(run), "--width", "0.07", "--step", "5"]) == 2
    assert "there is no average of step 5; there are those of 2, 4, 6, 8" in capsys.readouterr().err
    assert average.main(["--run", str(run), "--width", "0.07", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} exists: give another --out" in capsys.readouterr().err


def test_averages_of_the_steps_that_a_restart_repeats_are_moved_aside(without_one, tiny):
    config = configure(tiny, without_one, *SETS)
    _, move_others_aside = choose(config, Resume("restart"))
    move_others_aside()
    assert average.saved_averages(without_one) == []
    assert len(list(without_one.glob("averages/aside-*/step-*/width-*.safetensors"))) == 40


def test_a_damaged_average_is_named(without_one, capsys):
    file = without_one / "averages/step-00000010/width-0.1.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert average.main(["--run", str(without_one), "--width", "0.07"]) == 2
    assert f"{file} cannot be read as an average" in capsys.readouterr().err


def test_a_width_far_from_those_kept_is_made_with_a_warning(without_one, tmp_path, caplog):
    assert average.main(["--run", str(without_one), "--width", "0.02", "--out", str(tmp_path / "far")]) == 0
    assert "come no nearer to width 0.02 than" in caplog.text
