"""What an edit keeps of an image, what it changes, and what its command says of mistakes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from models.diffusion import Diffusion
from tests.trainer.runs import configure, train
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig
from trainer.edit import main
from trainer.sample.draw import draw_batch, load_run
from trainer.sample.edit import Edit, block_means, edited, grey_values, known_pixels


class Denoiser(nn.Module):
    """Predicts the noisy image, within the range of pixels: what is coarse in it survives."""

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        return x_t.clamp(-1, 1)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    # A rate that moves the near-zero output layer away from grey within ten steps.
    train(configure(tiny, directory, "training.learning_rate_g.peak=0.05"))
    return directory


def colour(tiny: tuple[str, ...], *sets: str) -> tuple[Diffusion, TrainConfig]:
    config = load_config("digits", [*tiny, "run.directory=unused", "data.image_channels=3", *sets])
    return Diffusion.from_config(config.diffusion), config


def smooth_images(channels: int, size: int = 8, num: int = 3) -> Tensor:
    coarse = torch.rand(num, channels, 2, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    return nn.functional.interpolate(coarse, size=size, mode="bilinear")


def levels(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round()


def test_an_edit_from_the_last_step_that_keeps_nothing_is_sampling(run):
    generator, diffusion, config = load_run(run)
    drawn = draw_batch(generator, diffusion, config, 5, torch.arange(7, 10), None)
    edit = Edit(start=diffusion.num_timesteps, seed=5)
    assert torch.equal(edited(generator, diffusion, config, edit, smooth_images(1), torch.arange(7, 10)), drawn)
    assert len(drawn.unique()) > 50


@pytest.mark.parametrize("domain", ["pixels", "haar"])
@pytest.mark.parametrize("repeats", [1, 3])
def test_known_pixels_come_back_and_the_others_are_new(tiny, domain, repeats):
    size = 16 if domain == "haar" else 8
    diffusion, config = colour(tiny, f"data.domain={domain}", f"data.image_size={size}")
    given, mask = smooth_images(3, size), torch.zeros(3, 1, size, size)
    mask[..., : size // 2] = 1
    edit = Edit(start=diffusion.num_timesteps, keep=known_pixels(mask), repeats=repeats)
    result = edited(Denoiser(), diffusion, config, edit, given, torch.arange(3)).float()
    known = mask.expand_as(given) == 1
    assert (result - levels(given))[known].abs().max() <= 1
    assert (result - levels(given))[~known].abs().mean() > 20
    other = Edit(start=diffusion.num_timesteps, keep=known_pixels(mask), repeats=repeats, seed=1)
    assert not torch.equal(edited(Denoiser(), diffusion, config, other, given, torch.arange(3)).float(), result)


@pytest.mark.parametrize(("keep", "name"), [(grey_values, "grey"), (block_means(4), "blocks")])
def test_grey_values_and_block_means_stay_and_the_rest_is_new(tiny, keep, name):
    diffusion, config = colour(tiny)
    given = smooth_images(3) / 4  # far from black and white, where pixels are clipped
    quiet = nn.Sequential()
    quiet.forward = lambda x_t, t, z: x_t.clamp(-0.3, 0.3)  # type: ignore[method-assign]
    result = edited(quiet, diffusion, config, Edit(start=2, keep=keep), given, torch.arange(3))
    values = result.float() / 127.5 - 1
    assert (keep(values) - keep(given)).abs().max() < 1 / 127.5
    assert (values - given).abs().mean() > 0.02


def test_a_projector_keeps_the_part_that_it_has_kept():
    x = torch.randn(3, 3, 8, 8)
    for keep in (grey_values, block_means(2), known_pixels((torch.rand(3, 1, 8, 8) > 0.5).float())):
        torch.testing.assert_close(keep(keep(x)), keep(x))
        assert not torch.equal(keep(x), x)


def test_variations_differ_and_have_what_is_coarse_in_common(tiny):
    diffusion, config = colour(tiny, "diffusion.num_timesteps=8")
    given = smooth_images(3)[:1].expand(4, -1, -1, -1)
    results = edited(Denoiser(), diffusion, config, Edit(start=1), given, torch.arange(4)).float()
    assert len({tuple(result.flatten().tolist()) for result in results}) == 4
    coarse, target = (block_means(4)(x).flatten(1) for x in (results, levels(given)))
    near = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(coarse, target, strict=True)]
    assert min(near) > 0.8
    # The more noise, the less is left.
    far = block_means(4)(edited(Denoiser(), diffusion, config, Edit(start=8), given, torch.arange(4)).float()).flatten(
        1
    )
    assert max(abs(torch.corrcoef(torch.stack(p))[0, 1].item()) for p in zip(far, target, strict=True)) < 0.7


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder with a photograph of another size, one with a transparent half, and a text that is named like one."""
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    half = Image.fromarray(pixels).convert("RGBA")
    half.paste((0, 0, 0, 0), (0, 0, 15, 24))
    half.save(folder / "b.png")
    (folder / "c.jpg").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def test_the_command_edits_a_folder_and_names_what_it_left_out(run, pictures, tmp_path, capsys):
    words = ["--run", str(run), "--image", str(pictures), "--variations", "--num", "2", "--out", str(tmp_path / "out")]
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.out == f"4 images: {tmp_path / 'out'}\n"
    assert said.err == f"left out: {pictures / 'c.jpg'}: is no image of a known format\n"
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["a-0.png", "a-1.png", "b-0.png", "b-1.png"]
    contents = {(tmp_path / "out" / name).read_bytes() for name in names}
    assert len(contents) == 4
    assert main([*words[:-1], str(tmp_path / "again")]) == 1
    assert {(tmp_path / "again" / name).read_bytes() for name in names} == contents


def test_a_result_does_not_depend_on_the_other_images_and_results(run, pictures, tmp_path):
    (pictures / "c.jpg").unlink()
    for name, more in {
        "all": ["--image", str(pictures), "--num", "3"],
        "one": ["--image", str(pictures / "b.png")],
    }.items():
        assert main(["--run", str(run), "--stroke", *more, "--out", str(tmp_path / name)]) == 0
    among_others, alone = (np.array(Image.open(tmp_path / name)) for name in ("all/b-0.png", "one/b.png"))
    assert np.array_equal(among_others, alone)


def test_a_model_with_classes_wants_one(tiny, pictures, tmp_path, capsys):
    train(configure(tiny, tmp_path / "run", "data.num_classes=10", "training.total_images=32"))
    words = ["--run", str(tmp_path / "run"), "--image", str(pictures / "a.png"), "--stroke"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "a class is missing: this run has the classes 0 to 9" in capsys.readouterr().err
    assert main([*words, "--class", "3", "--out", str(tmp_path / "out")]) == 0


def test_the_pixels_of_a_small_image_are_the_means_of_the_enlarged_one(run, tmp_path):
    given = np.array([[60, 120], [180, 90]], dtype=np.uint8)
    Image.fromarray(given).save(tmp_path / "small.png")
    words = ["--upscale", "4", "--resample", "3", "--image", str(tmp_path / "small.png")]
    assert main(["--run", str(run), *words, "--out", str(tmp_path / "out")]) == 0
    large = np.array(Image.open(tmp_path / "out" / "small.png")).astype(float)
    assert large.std() > given.std()  # with details
    np.testing.assert_allclose(large.reshape(2, 4, 2, 4).mean(axis=(1, 3)), given, atol=4)  # some pixels are clipped


def test_masks_that_do_not_fit_or_fill_nothing_are_refused(run, pictures, tmp_path, capsys):
    Image.new("L", (16, 16), 255).save(tmp_path / "white.png")
    words = ["--run", str(run), "--image", str(pictures / "a.png"), "--out", str(tmp_path / "out")]
    assert main([*words, "--mask", str(tmp_path / "white.png")]) == 2
    assert "which has no black part to fill" in capsys.readouterr().err
    Image.new("L", (16, 16), 0).save(tmp_path / "square.png")
    assert main([*words, "--mask", str(tmp_path / "square.png")]) == 1
    assert "has 30x24 pixels, another shape than the mask's 16x16" in capsys.readouterr().err
    # A photograph that its metadata turn upright has the shape of a mask that is upright.
    turned, portrait = Image.new("RGB", (30, 24)), Image.new("L", (24, 30), 255)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    portrait.paste(0, (0, 0, 24, 15))
    portrait.save(tmp_path / "portrait.png")
    upright = ["--image", str(tmp_path / "turned.jpg"), "--mask", str(tmp_path / "portrait.png")]
    assert main([*words[:2], *upright, "--out", str(tmp_path / "turned")]) == 0
    Image.new("RGBA", (16, 16), (9, 9, 9, 255)).save(tmp_path / "opaque.png")
    words[3] = str(tmp_path / "opaque.png")
    assert main([*words, "--mask", "alpha"]) == 1
    assert "has no transparent parts" in capsys.readouterr().err


def test_transparent_parts_and_black_parts_of_a_mask_are_filled(run, pictures, tmp_path, capsys):
    assert main(["--run", str(run), "--image", str(pictures), "--mask", "alpha", "--out", str(tmp_path / "alpha")]) == 1
    assert "a.png: has no transparent parts to fill" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "alpha").iterdir()] == ["b.png"]
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 16, 8))
    mask.save(tmp_path / "mask.png")
    given = Image.new("L", (8, 8), 77)
    given.save(tmp_path / "grey.png")
    words = ["--image", str(tmp_path / "grey.png"), "--mask", str(tmp_path / "mask.png"), "--resample", "2"]
    assert main(["--run", str(run), *words, "--out", str(tmp_path / "out")]) == 0
    filled = np.array(Image.open(tmp_path / "out" / "grey.png")).astype(int)
    assert np.abs(filled[4:] - 77).max() <= 1
    assert np.abs(filled[:4] - 77).max() > 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stroke", "--start-step", "4"], "noised to step 4 of 4, nothing is left of the image: take a smaller"),
        (["--colorize", "--start-step", "9"], "draws grey images"),
        (["--upscale", "2", "--start-step", "9"], "the start step is 9, but this model has the steps 1 to 4"),
        (["--colorize"], "this run draws grey images, and invents no colours"),
        (["--upscale", "3"], "upscale is 3, which does not divide the image size 8"),
        (["--stroke", "--class", "3"], "the class is 3; allowed: none, this run has no classes"),
        (["--mask", "nowhere.png"], "--mask is nowhere.png, which cannot be used: "),
        (["--stroke", "--image", "nowhere"], "--image is nowhere: there is no such file or folder"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(run, pictures, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    image = [] if "--image" in more else ["--image", str(pictures / "a.png")]
    assert main(["--run", str(run), *image, *more, "--out", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
