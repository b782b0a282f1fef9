"""Models whose images have five channels: what the commands write and show of them, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.prepare import command as prepare
from data.storage.errors import UserError
from tests.trainer.evaluate.scripted_networks import Plain, scripted
from tests.trainer.runs import configure, train
from trainer import edit, translate, walk
from trainer.checkpoint.snapshot import build_generator, save_snapshot
from trainer.config.io import load_config
from trainer.evaluate import command as evaluate
from trainer.evaluate.during_training import check_evaluation
from trainer.evaluate.measuring import pair_distance
from trainer.evaluate.networks.features import through, to_rgb
from trainer.sample import command as sample
from trainer.sample.conditions import PreparedPairs, as_pictures, draw_translations
from trainer.sample.draw import load_run
from trainer.sample.fidelity import psnr_and_ssim
from trainer.sample.images import make_grid, save_folder, save_images

C = 5
FIVE = (f"data.image_channels={C}", "data.condition_channels=1", "generator.num_res_blocks=1")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """20 pairs of two classes: an image of five channels, and its first channel at half the size."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(20):
        name = f"{'xy'[number % 2]}/{number:02d}"
        for part in ("a", "b"):
            (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(number).integers(0, 128, (8, 8, C)) + 127 * (number % 2)
        np.save(folder / f"b/{name}.npy", image.astype(np.uint16) << 8)
        Image.fromarray(image[::2, ::2, 0].astype(np.uint8)).save(folder / f"a/{name}.png")
    source, line = f"pairs:{folder}/a:{folder}/b", ["--size", "8", "--channels", "5", "--condition-channels", "1"]
    for name, classes in (("labelled", "folders"), ("plain", "none")):
        more = ["--classes", classes, "--workers", "0"]
        assert prepare.main([source, "--out", str(folder / name), *line, *more]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tiny, pairs, tmp_path_factory) -> Path:
    """A snapshot with random weights, whose images differ."""
    folder = tmp_path_factory.mktemp("run") / "made"
    config = load_config("digits", [*tiny, *FIVE, f"data.path={pairs}/plain", f"run.directory={folder}"])
    torch.manual_seed(0)
    generator = build_generator(config).requires_grad_(False)
    for parameter in generator.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    save_snapshot(folder, generator.state_dict(), config, step=0)
    return folder


def test_results_are_arrays_and_one_picture_with_a_row_for_each(run, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    line = ["--run", str(run), "--input", str(pairs / "plain"), "--max-inputs", "3", "--num", "2"]
    assert translate.main([*line, "--out", str(out)]) == 0
    names = [f"000001{part}" for part in ("-0.npy", "-1.npy", "-mean.npy", "-std.npy", ".png")]
    assert sorted(file.name for file in out.glob("000001*")) == names
    first, second, mean, deviation = (np.load(out / name) for name in names[:4])
    assert (first.dtype, first.shape) == (np.uint8, (8, 8, C))
    assert not np.array_equal(first, second)
    both = np.stack([first, second]).astype(np.float32)
    assert np.array_equal(mean, both.mean(axis=0).round())
    assert np.array_equal(deviation, both.std(axis=0).round())
    with Image.open(out / names[4]) as picture:
        pixels = np.asarray(picture)
    scale = pixels.shape[1] // (8 * C)
    assert pixels.shape == (4 * 8 * scale + 3 * 2, 8 * C * scale)
    assert np.array_equal(pixels[: 8 * scale : scale, ::scale], first.transpose(0, 2, 1).reshape(8, 8 * C))
    # The table compares all channels.
    with PreparedPairs(pairs / "plain", load_run(run)[2]) as prepared:
        images = prepared.read(range(3))[0].float()
    results = np.stack([np.load(out / f"{i:06d}-{k}.npy") for i in range(3) for k in range(2)])
    drawn = torch.from_numpy(results).permute(0, 3, 1, 2).float()
    psnr, ssim = psnr_and_ssim(drawn, images.repeat_interleave(2, dim=0))
    assert f"{'a result':<34}{psnr.mean():>10.2f}{ssim.mean():>10.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_results_are_images_of_pairs_themselves(run, pairs, tmp_path, suffix):
    out, line = tmp_path / "out", ["--run", str(run), "--num", "1"]
    file = next((pairs / "a/x").iterdir())
    line += ["--input", str(file), "--out"]
    assert translate.main([*line, str(out), *(["--tiff"] if suffix == ".tif" else [])]) == 0
    assert sorted(found.suffix for found in out.iterdir()) == sorted([suffix, ".png"])
    assert translate.main([*line, str(tmp_path / "again")]) == 0
    source = f"pairs:{file.parent}:{out}"
    line = ["--size", "8", "--channels", "5", "--condition-channels", "1", "--workers", "0"]
    for picture in out.glob("*.png"):
        picture.unlink()
    assert prepare.main([source, "--out", str(tmp_path / "set"), *line]) == 0
    with PreparedPairs(tmp_path / "set", load_run(run)[2]) as prepared:
        image = prepared.read([0])[0][0]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.load(tmp_path / f"again/{file.stem}.npy"))


def test_tiff_without_its_library_is_refused_before_anything_is_read(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(translate, "can_use_tifffile", lambda: False)
    assert translate.main(["--run", str(run), "--input", "a.png", "--tiff", "--out", str(tmp_path / "out")]) == 2
    assert "--tiff needs tifffile" in capsys.readouterr().err


def test_the_grid_of_a_run_shows_the_channels_side_by_side(run):
    loaded = load_run(run)
    with PreparedPairs(loaded[2].data.path, loaded[2]) as prepared:
        images, conditions, _ = prepared.read(range(2))
    pictures = draw_translations(*loaded, num=16)
    assert pictures.shape == (16, C, 8, 8)
    assert torch.equal(pictures[0, 0], conditions[0, 0])
    assert torch.equal(pictures[1], images[0])
    grid = make_grid(pictures, columns=8)
    scale = 8  # as in a grid of eight grey images of 8 px
    assert grid.shape == (1, 2 * 8 * scale + 2, 8 * (8 * C * scale + 2) - 2)
    left = 8 * C * scale + 2
    assert torch.equal(grid[0, : 8 * scale : scale, left : left + 8 * scale : scale], images[0, 0])


def test_conditions_are_shown_next_to_images_of_many_channels():
    grey, six = torch.ones(2, 1, 4, 4, dtype=torch.uint8), torch.arange(6, dtype=torch.uint8)
    shown = as_pictures(grey, C)
    assert torch.equal(shown[:, :1], grey)
    assert shown.sum() == grey.sum()
    shown = as_pictures(six[None, :, None, None].expand(2, 6, 4, 4), C)
    assert shown[0, :, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_network_is_trained_on_all_channels_and_others_say_that_they_do_not_see_them(run, pairs, capsys):
    line = ["--run", str(run), "--num", "16", "--json", "--reference"]
    assert evaluate.main([*line, str(pairs / "labelled")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["psnr_db"] > 0
    assert evaluate.main([*line, str(pairs / "labelled"), "--network", "inception"]) == 2
    assert "inception sees grey and RGB images, but these have 5 channels" in capsys.readouterr().err
    with pytest.raises(UserError, match="X sees grey and RGB images, but these have 5 channels: measure with"):
        to_rgb(torch.zeros(2, C, 8, 8, dtype=torch.uint8), "X")
    with pytest.raises(UserError, match="images of 5 channels cannot go through JPEG"):
        through("jpeg")(torch.zeros(2, C, 8, 8, dtype=torch.uint8))


def test_a_network_that_takes_them_tells_how_close_a_sample_is_to_the_image_of_its_pair(run, pairs, tmp_path, capsys):
    images = torch.randn(4, 3)
    assert pair_distance(images.repeat(2, 1), images) == 0
    assert pair_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [-1.0]])) == pytest.approx(3.0)
    network = scripted(Plain(), tmp_path / "plain.pt")
    line = ["--run", str(run), "--num", "30", "--reference", str(pairs / "plain"), "--network", str(network)]
    assert evaluate.main([*line, "--json", "--cache", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.2 < found["pair_distance"] < 5
    assert evaluate.main([*line, "--cache", str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{'feature distance to its image':<34}{found['pair_distance']:>10.3f}  (1: as to that of another)"


def test_without_labels_psnr_and_ssim_of_the_pairs_of_the_reference_are_measured(run, pairs, capsys):
    line = ["--run", str(run), "--reference", str(pairs / "plain"), "--num", "16"]
    assert evaluate.main(line) == 0
    said = capsys.readouterr()
    assert said.err.endswith("plain has no labels, so PSNR and SSIM are all\n")
    assert said.out.splitlines()[0].startswith("means over 16 pairs")
    assert evaluate.main([*line, "--json", "--network", "none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"psnr_db", "ssim", "num_samples", "source"}
    assert evaluate.main([*line, "--card", "card.json", "--network", "none"]) == 2
    assert "PSNR and SSIM of pairs are all that is measured: leave --card out" in capsys.readouterr().err


def test_an_evaluation_during_training_that_cannot_see_the_images_is_refused_at_the_start(tiny, pairs, tmp_path):
    sets = [*tiny, *FIVE, f"data.path={pairs}/labelled", f"run.directory={tmp_path}", "evaluation.interval_images=16"]
    check_evaluation(load_config("digits", sets))
    with pytest.raises(UserError, match="images of 5 channels cannot go through JPEG"):
        check_evaluation(load_config("digits", [*sets, "evaluation.through=jpeg"]))
    with pytest.raises(UserError, match="sees grey and RGB images, but these have 5 channels"):
        check_evaluation(load_config("digits", [*sets, "evaluation.network=lite0"]))


@pytest.mark.parametrize("channels", [2, C])
@pytest.mark.parametrize(
    ("main", "more"),
    [
        (sample.main, ["--num", "2", "--out", "a.png"]),
        (walk.main, ["--seeds", "0,1", "--frames", "4", "--out", "a.webp"]),
        (edit.main, ["--image", "a.png", "--variations", "--start-step", "1", "--out", "b"]),
    ],
)
def test_commands_that_take_no_condition_name_the_one_that_does(
    tiny, tmp_path, monkeypatch, capsys, channels, main, more
):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("a.png")
    config = load_config("digits", [*tiny, *FIVE, f"data.image_channels={channels}", "run.directory=x"])
    save_snapshot(tmp_path / "run", build_generator(config).state_dict(), config, step=0)
    assert main(["--run", "run", *more]) == 2
    assert "this run translates images, and needs some to translate" in capsys.readouterr().err


def test_a_folder_of_images_of_many_channels_holds_arrays(tmp_path):
    images = torch.randint(0, 256, (3, C, 8, 8), dtype=torch.uint8)
    save_folder(tmp_path / "many", images)
    found = [np.load(file) for file in sorted((tmp_path / "many").glob("*.npy"))]
    assert np.array_equal(np.stack(found), images.permute(0, 2, 3, 1).numpy())
    save_images(tmp_path / "grid.png", images)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "L"


@pytest.mark.slow
def test_a_run_of_pairs_with_images_of_five_channels_draws_evaluates_and_ends(tiny, pairs, tmp_path):
    more = (f"data.path={pairs}/labelled", "training.total_images=32", "evaluation.interval_images=32")
    train(configure(tiny, tmp_path, *FIVE, *more, "evaluation.num_samples=8", "training.augmentation.probability=0.5"))
    (grid,) = (tmp_path / "samples").iterdir()
    with Image.open(grid) as picture:
        assert picture.mode == "L"
        assert picture.width > 2 * picture.height
    loaded = load_run(tmp_path)
    assert loaded[2].image_form.shape == (C, 8, 8)
