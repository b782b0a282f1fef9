"""One picture of a run: real images, samples, and the curves of losses and quality."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.storage.files import replaced
from models.shapes import Uint8Image
from trainer.config.sections import RENAMED_FIGURES
from trainer.sample.images import make_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = 10
"""Rows of the grids; of more classes, the first ones are shown."""
COLUMNS = 8
LOSSES = ("loss_d", "loss_d_real", "loss_d_fake", "loss_g")
DISTANCES = ("fid", *(names["fid"] for names in RENAMED_FIGURES.values()))
"""A run has one of them."""
SHARES = ("precision", "recall", "coverage")
Labelled = tuple[Uint8Image, Tensor | None]
"""Images with their classes; None: their classes are not known."""
Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Step and value of each point, by the name of the curve."""


def draw_picture(file: Path, *, real: Labelled, samples: Labelled, class_names: Sequence[str], curves: Curves) -> None:
    """Draw and write the picture; the file appears complete or not at all.

    Args:
        file: name with .png; its folder exists.
        real: images of the data set.
        samples: generated images, with the classes that were requested.
        class_names: names of the classes.
        curves: of the run; those of `LOSSES`, `DISTANCES` and `SHARES` are drawn, as far as they are there.
    """
    # Loaded here, because it takes half a second, which other commands can do without.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 11), layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=(2, 1))
    for axis, title, labelled in zip(axes[0], ("real images", "samples"), (real, samples), strict=True):
        grid = _grid(labelled, class_names).permute(1, 2, 0).numpy()
        axis.imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=255)
        axis.set_title(title)
        axis.set_axis_off()
    for axis, title, names in ((axes[1, 0], "losses", LOSSES), (axes[1, 1], "quality", DISTANCES)):
        axis.set(title=title, xlabel="step")
        axis.grid(visible=True, alpha=0.3)
        _plot(axis, curves, names)
    # The distance falls by powers of ten, at the left; the shares are in [0, 1], at the right.
    quality, shares = axes[1, 1], axes[1, 1].twinx()
    distance = next((name for name in DISTANCES if curves.get(name)), DISTANCES[0])
    quality.set(yscale="log", ylabel=distance)
    shares.set(ylim=(0, 1), ylabel="share")
    _plot(shares, curves, SHARES, first_color=1, style="--")
    for axis, place in (
        (axes[1, 0], {}),
        (quality, {"bbox_to_anchor": (0, 0.42)}),
        (shares, {"bbox_to_anchor": (0, 0.22)}),
    ):
        if axis.lines:
            axis.legend(loc="center left" if place else "best", **place)
    for axis, lines in ((axes[1, 0], axes[1, 0].lines), (quality, [*quality.lines, *shares.lines])):
        if not lines:
            axis.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axis.transAxes)
    with replaced(file) as draft:
        figure.savefig(draft, format="png", dpi=100)


def _plot(axis: "Axes", curves: Curves, names: Sequence[str], *, first_color: int = 0, style: str = "-") -> None:
    for color, name in enumerate(names, start=first_color):
        if points := curves.get(name):
            axis.plot(*zip(*points, strict=True), f"C{color}{style}", label=name)


def _grid(labelled: Labelled, class_names: Sequence[str]) -> Tensor:
    """A row for each class where classes are known, otherwise the first images; uint8 [C, H, W]."""
    images, labels = labelled
    if labels is None:
        return make_grid(images[: ROWS * COLUMNS])
    of_class = [images[labels == label][:COLUMNS] for label in range(min(ROWS, len(class_names)))]
    columns = min(map(len, of_class))
    if columns == 0:
        return make_grid(images[: ROWS * COLUMNS])
    in_turn = torch.stack([rows[:columns] for rows in of_class], dim=1).flatten(0, 1)
    return make_grid(in_turn, list(class_names[: len(of_class)]))
