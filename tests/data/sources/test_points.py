"""Points of the plane: the mixture, and their way through preparation and decoder."""

import numpy as np

from data.prepare import command as prepare
from data.shards.index import load_index
from data.sources.arrays import MODE_DEVIATION_LEVELS, MODE_LEVELS, draw_points, gaussians25_source
from trainer.evaluate.reference import read_all


def test_mixture_has_25_equal_round_modes() -> None:
    points, modes = draw_points(25_000, seed=3)
    assert points.shape == (25_000, 2)
    counts = np.bincount(modes, minlength=25)
    assert ((counts > 850) & (counts < 1150)).all()  # 1000 expected, standard deviation 31
    centres = np.array([(x, y) for x in MODE_LEVELS for y in MODE_LEVELS])
    offsets = points - centres[modes]
    assert np.abs(offsets.mean(axis=0)).max() < 0.1
    # Rounding to whole levels adds a twelfth to the variance.
    covariance = np.cov(offsets.T)
    np.testing.assert_allclose(covariance, np.eye(2) * (MODE_DEVIATION_LEVELS**2 + 1 / 12), atol=0.2)


def test_first_points_are_the_same_for_any_number_of_them_and_others_for_another_seed() -> None:
    few, many, others = (draw_points(n, seed=s)[0] for n, s in ((10, 0), (50, 0), (10, 1)))
    assert np.array_equal(few, many[:10])
    assert not np.array_equal(few, others)


def test_points_come_out_of_the_shards_as_they_went_in(tmp_path) -> None:
    out = tmp_path / "points"
    assert prepare.main(["gaussians25", "--out", str(out), "--max-images", "60", "--seed", "5", "--workers", "1"]) == 0
    index = load_index(out)
    assert (index.image_size, index.image_channels, index.num_classes) == (1, 2, 25)
    images, labels = read_all(out)
    points, modes = draw_points(60, seed=5)
    assert labels is not None
    # Preparation shuffles them.
    found = sorted(zip(images[:, :, 0, 0].tolist(), labels.tolist(), strict=True))
    assert found == sorted(zip(points.tolist(), modes.tolist(), strict=True))
    assert prepare.main(["inspect", str(out), "--sheet", str(tmp_path / "sheet.png")]) == 0


def test_labels_are_the_modes() -> None:
    source = gaussians25_source(num_points=20, seed=0)
    assert len(source.class_names or ()) == 25
    for item in source.items:
        assert item.label is not None
        x, y = (int(level) for level in item.name.split("-")[1:])
        name = (source.class_names or ())[item.label]
        assert np.hypot(x - float(name.split(", ")[0]), y - float(name.split(", ")[1])) < 5 * MODE_DEVIATION_LEVELS
