"""Images larger than a model's are edited in tiles: what is kept is kept, and tiles leave no seams."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.diffusion import Diffusion
from tests.trainer.runs import configure, train
from trainer.config.io import load_config
from trainer.edit import main
from trainer.sample.draw import load_run
from trainer.sample.edit import Edit, edited, known_pixels
from trainer.sample.tiles import OVERLAP, in_tiles, starts_of_tiles


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """Of a model of 8 px."""
    directory = tmp_path_factory.mktemp("run")
    train(configure(tiny, directory, "training.learning_rate_g.peak=0.05"))
    return directory


@pytest.mark.parametrize(("length", "size"), [(8, 8), (9, 8), (14, 8), (15, 8), (100, 8), (101, 32), (700, 256)])
def test_tiles_cover_a_line_and_overlap(length, size):
    starts = starts_of_tiles(length, size)
    assert (starts[0], starts[-1]) == (0, length - size)
    steps = np.diff(starts)
    assert len(steps) == 0 or (steps.min() > 0 and steps.max() <= (1 - OVERLAP) * size + 1)


def levels_by_tile(seen: list[int]):
    """A generator whose tiles have nothing in common: each is of one level, its own."""

    def generate(x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        seen.append(len(x_t))
        level = (torch.arange(len(x_t)) * 7 % 5).float() / 2 - 1
        return level.view(-1, 1, 1, 1).expand_as(x_t)

    return generate


def test_even_tiles_that_disagree_are_joined_smoothly():
    seen: list[int] = []
    x_t, t, z = torch.zeros(1, 1, 50, 77), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3)
    image = in_tiles(levels_by_tile(seen), 16, 10)(x_t, t, z)
    tiles = len(starts_of_tiles(50, 16)) * len(starts_of_tiles(77, 16))
    assert seen == [10] * -(-tiles // 10)
    steps = torch.cat([image.diff(dim=2).flatten(), image.diff(dim=3).flatten()]).abs()
    assert image.max() - image.min() > 1.9
    # The levels of two tiles differ by up to 2: side by side, they would make a step of 2. Spread over 8 pixels, it is
    # a step of 0.25 at least.
    assert steps.max() < 0.5
    with_one = in_tiles(lambda x_t, t, z: x_t + 1, 16, 10)(x_t, t, z)
    torch.testing.assert_close(with_one, torch.ones_like(x_t))


def test_a_tile_has_the_class_and_the_latent_of_its_image():
    def generate(x_t: Tensor, t: Tensor, z: Tensor, label: Tensor) -> Tensor:
        return (t * 100 + z[:, 0] * 10 + label).view(-1, 1, 1, 1).expand_as(x_t)

    x_t, t, z = torch.zeros(2, 1, 20, 30), torch.tensor([1, 2]), torch.tensor([[3.0], [4.0]])
    images = in_tiles(generate, 8, 5)(x_t, t, z, label=torch.tensor([5, 6]))
    torch.testing.assert_close(images, torch.tensor([135.0, 246.0]).view(2, 1, 1, 1).expand_as(x_t))


@pytest.mark.parametrize("domain", ["pixels", "haar"])
def test_known_pixels_of_a_large_image_come_back(tiny, domain):
    size = 16 if domain == "haar" else 8
    config = load_config("digits", [*tiny, "run.directory=unused", f"data.domain={domain}", f"data.image_size={size}"])
    diffusion = Diffusion.from_config(config.diffusion)
    given = torch.rand(1, 1, 30, 44, generator=torch.Generator().manual_seed(0)) - 0.5
    mask = torch.zeros(1, 1, 30, 44)
    mask[..., 10:] = 1
    edit = Edit(start=diffusion.num_timesteps, keep=known_pixels(mask), repeats=2)
    result = edited(lambda x_t, t, z: x_t.clamp(-1, 1), diffusion, config, edit, given, torch.arange(1)).float()  # type: ignore[arg-type]
    levels = ((given + 1) * 127.5).round()
    assert (result - levels)[..., 10:].abs().max() <= 1
    assert (result - levels)[..., :10].abs().mean() > 20


@pytest.mark.parametrize("start", [1, 4])
def test_seams_of_a_trained_model_are_not_steeper_than_the_rest(run, monkeypatch, start):
    generator, diffusion, config = load_run(run)
    size, width = 8, 80
    coarse = torch.rand(1, 1, 4, 10, generator=torch.Generator().manual_seed(0)) - 0.5
    given = torch.nn.functional.interpolate(coarse, size=(32, width), mode="bilinear")

    def steepness() -> float:
        """Mean step between columns where a tile starts or ends, by that between all others."""
        edits = [Edit(start=start, seed=seed) for seed in range(4)]
        results = [edited(generator, diffusion, config, edit, given, torch.arange(1)) for edit in edits]
        steps = torch.cat(results).float().diff(dim=3).abs().mean(dim=(0, 1, 2))
        _, *inner = starts_of_tiles(width, size)
        edges = {x - 1 for x in inner} | {size - 1 + x for x in (0, *inner[:-1])}
        return (steps[sorted(edges)].mean() / steps[sorted(set(range(width - 1)) - edges)].mean()).item()

    assert steepness() < 1.15
    monkeypatch.setattr("trainer.sample.tiles.OVERLAP", 0.0)
    assert steepness() > 1.4


def test_the_command_edits_whole_images(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    pictures = tmp_path / "in"
    pictures.mkdir()
    for name, (width, height) in {"wide": (37, 21), "exact": (8, 8), "small": (6, 4)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)).save(pictures / f"{name}.png")

    def results(folder: str, *words: object) -> dict[str, np.ndarray]:
        line = ["--run", run, "--tiles", *words, "--out", tmp_path / folder]
        assert main([str(word) for word in line]) == 0
        return {file.stem: np.asarray(Image.open(file)) for file in (tmp_path / folder).iterdir()}

    of_all = results("all", "--image", pictures, "--stroke", "--num", "2")
    shapes = {name: image.shape for name, image in of_all.items() if name.endswith("-1")}
    assert shapes == {"wide-1": (21, 37), "exact-1": (8, 8), "small-1": (8, 12)}
    alone = results("alone", "--image", pictures / "wide.png", "--stroke")
    assert np.array_equal(alone["wide"], of_all["wide-0"])
    assert not np.array_equal(of_all["wide-0"], of_all["wide-1"])
    upscaled = results("upscaled", "--image", pictures / "wide.png", "--upscale", "2", "--resample", "2")
    assert upscaled["wide"].shape == (42, 74)

    given = np.asarray(Image.open(pictures / "wide.png")).astype(int)
    mask = np.full((21, 37), 255, np.uint8)
    mask[3:15, 30:] = 0  # outside the square centre
    Image.fromarray(mask).save(tmp_path / "mask.png")
    filled = results("filled", "--image", pictures / "wide.png", "--mask", tmp_path / "mask.png")["wide"]
    assert np.abs(filled - given)[mask > 0].max() <= 1
    assert np.abs(filled - given)[mask == 0].mean() > 10
    Image.merge("LA", [Image.fromarray(given.astype(np.uint8)), Image.fromarray(mask)]).save(tmp_path / "alpha.png")
    by_alpha = results("alpha", "--image", tmp_path / "alpha.png", "--mask", "alpha")["alpha"]
    assert np.abs(by_alpha.astype(int) - given)[mask > 0].max() <= 1


def test_an_image_that_is_too_large_is_left_out(run, tmp_path, capsys):
    Image.new("L", (1100, 1000)).save(tmp_path / "large.png")
    line = ["--run", run, "--tiles", "--upscale", "4", "--image", tmp_path / "large.png", "--out", tmp_path / "out"]
    assert main([str(word) for word in line]) == 1
    assert "large.png: would have more than 16777216 pixels, too many to be edited in tiles" in capsys.readouterr().err
