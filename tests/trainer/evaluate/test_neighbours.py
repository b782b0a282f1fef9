"""Samples that are copies of training images are found, counted and drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainer.evaluate.scripted_networks import Plain, WithClasses, scripted
from tests.trainer.runs import configure, train
from trainer.evaluate.command import main
from trainer.evaluate.neighbours import find_neighbours
from trainer.evaluate.reference import pick_images, read_all
from trainer.sample.images import save_npz

RANDOM = torch.Generator().manual_seed(0)


def normals(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RANDOM)


def test_share_of_unseen_points_is_about_5_percent_and_copies_add_to_it() -> None:
    data, unseen = normals(3000, 8), normals(2000, 8)
    found = find_neighbours(unseen, data)
    # 2000 draws of probability 0.05 have a deviation of 0.005; the threshold's own is as large.
    assert found.closer_share == pytest.approx(0.05, abs=0.02)
    copies = unseen.clone()
    copies[:500] = data[1000:1500] + 1e-3 * normals(500, 8)
    found = find_neighbours(copies, data)
    assert found.closer_share == pytest.approx(0.25 + 0.75 * 0.05, abs=0.02)
    assert torch.equal(found.indices[:500, 0], torch.arange(1000, 1500))


def test_nearest_are_those_of_all_pairs_and_exact_where_they_are_small() -> None:
    data, points = 100 + normals(1500, 16), 100 + normals(1100, 16)
    points[7] = data[3]
    points[8] = data[4] + 1e-4
    found = find_neighbours(points, data)
    wide = (points.double()[:, None] - data.double()).norm(dim=2).sort(dim=1)
    assert torch.equal(found.indices, wide.indices[:, :5])
    torch.testing.assert_close(found.distances.double(), wide.values[:, :5], rtol=1e-4, atol=1e-5)
    assert found.distances[7, 0] == 0
    own = (data.double()[:, None] - data.double()).norm(dim=2).fill_diagonal_(torch.inf).amin(dim=1)
    torch.testing.assert_close(found.reference_nearest.double(), own, rtol=1e-4, atol=1e-5)


def test_few_images_have_few_neighbours() -> None:
    found = find_neighbours(torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [3.0], [6.0]]))
    assert found.indices.tolist() == [[0, 1, 2], [1, 2, 0]]
    assert found.reference_nearest.tolist() == [2.0, 2.0, 3.0]
    assert found.threshold == pytest.approx(2.0)
    assert found.closer_share == 1.0


def test_command_draws_copies_first_and_counts_them(
    tiny_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Pixels(torch.nn.Module):
        def forward(self, img: torch.Tensor) -> torch.Tensor:
            return img[:, 0].to(torch.float32).flatten(1)

    images, _ = read_all(tiny_digits)
    samples = torch.randint(0, 256, (40, *images.shape[1:]), dtype=torch.uint8, generator=RANDOM)
    samples[[5, 30]] = images[[1700, 3]]
    save_npz(tmp_path / "a.npz", samples)
    network, picture = scripted(Pixels(), tmp_path / "net.pt"), tmp_path / "near.png"
    arguments = ["--samples", str(tmp_path / "a.npz"), "--reference", str(tiny_digits), "--network", str(network)]
    arguments += ["--cache", str(tmp_path / "cache"), "--neighbours", str(picture)]
    capsys.readouterr()
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "closer than data to each other          5.0%, about 5% for unseen images" in out  # the two copies of 40
    assert f"the picture is {picture}" in err
    drawn = np.array(Image.open(picture))
    size, scale = images.shape[2], -(-512 // (6 * images.shape[2]))
    left = drawn.shape[1] - 6 * (size * scale + 2) + 2
    for column in (0, 1):  # the copy and the image that it is a copy of
        x = left + column * (size * scale + 2)
        cells = drawn[: size * scale : scale, x : x + size * scale : scale]
        assert (cells == images[1700, 0].numpy()).all() or (cells == images[3, 0].numpy()).all()
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["closer_share"] == 0.05


def test_images_are_picked_by_the_numbers_of_their_features(tiny_digits: Path, tmp_path: Path) -> None:
    images, _ = read_all(tiny_digits)
    numbers = [1796, 0, 64, 63, 64]
    assert torch.equal(pick_images(tiny_digits, numbers), images[numbers])
    save_npz(tmp_path / "a.npz", images[:100])
    assert torch.equal(pick_images(tmp_path / "a.npz", [99, 1]), images[[99, 1]])


def test_samples_of_a_run_are_drawn_again_for_the_picture(
    tiny: list[str], tiny_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(configure(tiny, tmp_path / "run", "training.total_images=32"))
    arguments = ["--run", str(tmp_path / "run"), "--num", "70", "--reference", str(tiny_digits), "--json"]
    arguments += ["--network", str(scripted(WithClasses(), tmp_path / "net.pt")), "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "--neighbours", str(tmp_path / "near.png")]) == 0
    assert (tmp_path / "near.png").is_file()
    assert 0 <= json.loads(capsys.readouterr().out)["closer_share"] <= 1


def test_what_has_no_neighbours_is_refused(
    tiny_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_npz(tmp_path / "a.npz", torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8, generator=RANDOM))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    network = str(scripted(Plain(), tmp_path / "net.pt"))
    basis = ["--samples", str(tmp_path / "a.npz"), "--network", network, "--cache", str(tmp_path)]
    for arguments, message in {
        ("--reference", str(tmp_path / "stats.npz"), "--neighbours", str(tmp_path / "n.png")): "holds only statistics",
        ("--reference", str(tiny_digits), "--neighbours", str(tmp_path / "n.png")): "must be equal",
        ("--reference", str(tiny_digits), "--neighbours", str(tmp_path / "n.jpg")): "a name that ends in .png",
        ("--reference", str(tiny_digits), "--neighbours", str(tmp_path / "no" / "n.png")): "create it first",
    }.items():
        assert main([*basis, *arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
