"""Images that two data sets share are found, listed and drawn, though they are encoded and sized otherwise."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.prepare.command import main
from data.shards.index import ShardIndex

Refusal = Callable[..., str]
SHARED = (3, 17, 40)


@pytest.fixture(scope="module")
def halves(made_photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two data sets of 30 and 23 photographs at 64 and 32 px; the second has three of the first, encoded again."""
    root = tmp_path_factory.mktemp("halves")
    for name, numbers in (("train", (*range(27), 40, 41, 42)), ("test", (*range(100, 120), *SHARED))):
        (root / name).mkdir()
        for number in numbers:
            source = made_photographs / f"{number:03d}.jpg"
            if name == "train":
                shutil.copy(source, root / name)
            else:
                Image.open(source).save(root / name / f"t{number}.jpg", quality=60)
    for name, size in (("train", "64"), ("test", "32")):
        command = [str(root / name), "--out", str(root / f"{name}-set"), "--size", size, "--shard-samples", "9"]
        assert main([*command, "--workers", "0"]) == 0
    return root / "train-set", root / "test-set"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_shared_images_are_listed_and_drawn(
    halves: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    train, test = map(str, halves)
    sheet = str(tmp_path / "sheet.png")
    assert main(["inspect", train, "--sheet", sheet, "--against", test, "--workers", str(workers)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (at,) = [number for number, line in enumerate(lines) if line.startswith("near ")]
    assert "3 of 30 images have a near-duplicate among the 23 of" in lines[at]
    pairs = {(line.split()[3][-3:], line.split()[-1].rpartition("-t")[2]) for line in lines[at + 1 : at + 4]}
    assert pairs == {(f"{number:03d}", str(number)) for number in SHARED}
    assert lines[at + 4] == f"pairs         {tmp_path}/sheet-pairs.png (3 pairs)"
    drawn = np.asarray(Image.open(tmp_path / "sheet-pairs.png")).astype(int)
    assert drawn.shape == (128, 3 * 258 - 2, 3)
    left, right = (np.stack([drawn[:, 258 * i + at : 258 * i + at + 128] for i in range(3)]) for at in (0, 128))
    # Each has its own near-duplicate beside it.
    assert abs(left[:, None] - right[None]).mean(axis=(2, 3, 4)).argmin(axis=1).tolist() == [0, 1, 2]


def test_sets_without_shared_images_have_no_pairs(
    halves: tuple[Path, Path], prepared: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = str(tmp_path / "sheet.png")
    assert main(["inspect", str(halves[0]), "--sheet", sheet, "--against", prepared.location]) == 0
    assert "0 of 30 images have a near-duplicate among the 40 of" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_points_of_the_plane_are_refused(prepared: ShardIndex, tmp_path: Path, refusal: Refusal) -> None:
    assert main(["gaussians25", "--max-images", "50", "--out", str(tmp_path / "points"), "--workers", "0"]) == 0
    told = refusal(
        "inspect", prepared.location, "--sheet", tmp_path / "a.png", "--against", tmp_path / "points", code=1
    )
    assert "holds points of the plane" in told
