"""The picture of a run."""

from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from trainer.evaluate.command import main
from trainer.evaluate.picture import draw_picture


@pytest.mark.parametrize("labelled", [True, False])
def test_picture_shows_the_curves_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labelled: bool):
    drawn: list[str] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **b: drawn.append(b["label"]) or plot(self, *a, **b))
    images = torch.randint(0, 256, (20, 1, 16, 16), dtype=torch.uint8)
    labels = torch.arange(20) % 2 if labelled else None
    curves = {"loss_d": [(1, 0.7)], "loss_g": [(1, 0.7), (2, 0.6)], "coverage": [(2, 0.3)], "images_per_s": [(1, 9.0)]}
    file = tmp_path / "overview.png"
    draw_picture(file, real=(images, labels), samples=(images, labels), class_names=["a", "b"], curves=curves)
    assert drawn == ["loss_d", "loss_g", "coverage"]
    with Image.open(file) as picture:
        assert picture.size == (1400, 1100)
    assert [path.name for path in tmp_path.iterdir()] == ["overview.png"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--picture", "no/folder/a.png"], "there is no folder no/folder: create it"),
        (["--picture", "a.jpg"], "--picture takes a name that ends in .png"),
        (["--picture", "a.png", "--network", "n.pt"], "needs the network classifier"),
    ],
)
def test_picture_that_cannot_be_drawn_is_refused_before_any_work(given, told, capsys):
    assert main(["--run", "nowhere", "--reference", "nowhere", *given]) == 2
    assert told in capsys.readouterr().err
