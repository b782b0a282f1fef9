"""Modes are counted correctly, the picture shows points at their positions, and the toy run finds the modes."""

import json

import pytest
import torch
from PIL import Image

from data.prepare import command as prepare
from tests.launch import run_python
from tests.trainer.runs import Recorder, train
from trainer.config.io import load_config
from trainer.points import data_points, main, point_quality
from trainer.sample.draw import sample_run
from trainer.sample.scatter import SIDE_PIXELS, scatter


def test_the_mixture_itself_has_all_modes_and_nearly_all_points_close():
    quality = point_quality(data_points(10_000, seed=0))
    assert quality.num_modes == 25
    # Three standard deviations of a round Gaussian contain 1 - exp(-9/2) = 98.9%.
    assert quality.share_close == pytest.approx(0.989, abs=0.005)
    assert 0.03 < quality.smallest_mode_share < 0.04


def test_missing_modes_and_far_points_are_seen():
    points = data_points(10_000, seed=0)
    left = points[points[:, 0, 0, 0] < 100]
    assert point_quality(left).num_modes == 10
    between = torch.full((len(left), 2, 1, 1), 52, dtype=torch.uint8)
    half = point_quality(torch.cat([left, between]))
    assert half.share_close == pytest.approx(0.989 / 2, abs=0.005)


def test_other_images_are_refused():
    with pytest.raises(ValueError, match=r"2-D points \[N, 2, 1, 1\] are expected"):
        point_quality(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))


def test_picture_is_dark_where_points_are_with_y_upwards():
    points = torch.tensor([[10, 250]] * 5, dtype=torch.uint8)[:, :, None, None]
    picture = scatter(points)[0]
    assert picture.shape == (SIDE_PIXELS, SIDE_PIXELS)
    rows, columns = torch.nonzero(picture < 255, as_tuple=True)
    assert rows.max() < SIDE_PIXELS / 20 and columns.max() < SIDE_PIXELS / 20  # top left


@pytest.fixture(scope="module")
def points_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("points") / "data"
    assert prepare.main(["gaussians25", "--out", str(folder), "--max-images", "2000", "--workers", "1"]) == 0
    return folder


def short(points_data, directory, *more: str):
    sizes = ("data.loader_workers=0", "tracking.backends=[]", "checkpoint.save_interval_steps=null")
    fixed = (f"data.path={points_data}", f"run.directory={directory}", *sizes)
    return load_config("gaussians25", [*fixed, *more])


@pytest.mark.slow
def test_the_toy_trains_logs_and_draws_its_picture(points_data, tmp_path):
    outcome, recorder = train(short(points_data, tmp_path / "run", "training.total_images=1280"))
    assert outcome.finished
    assert isinstance(recorder, Recorder)
    with Image.open(str(outcome.samples)) as picture:
        assert picture.size == (SIDE_PIXELS, SIDE_PIXELS)
    assert sample_run(tmp_path / "run", 5, seed=0).shape == (5, 2, 1, 1)


@pytest.mark.slow
def test_command_prints_figures_and_draws_all_side_by_side(points_data, tmp_path, capsys):
    train(short(points_data, tmp_path / "run", "training.total_images=128"))
    run, picture = str(tmp_path / "run"), tmp_path / "points.png"
    assert main(["--run", run, "--num", "500", "--out", str(picture), "--json"]) == 0
    data, found = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (data["num_modes"], found["num_points"]) == (25, 500)
    with Image.open(picture) as image:
        assert image.width > 2 * SIDE_PIXELS
    assert main(["--run", run, "--out", str(tmp_path / "points.jpg")]) == 2
    assert "ends in .png" in capsys.readouterr().err
    assert main(["--run", str(tmp_path / "none")]) == 2
    assert run_python(["-m", "trainer.points", "--run", run, "--num", "0"], cwd=tmp_path).returncode == 2
