import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.shards.grid import GAP_LEVEL, GAP_PIXELS
from trainer.sample.images import (
    check_animation,
    check_destination,
    load_images,
    make_grid,
    open_images,
    save_folder,
    save_grid,
    save_images,
    save_npz,
    to_uint8,
)


def made_images(*, number: int = 5, channels: int = 3, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, channels, size, size), dtype=torch.uint8, generator=generator)


def test_every_level_comes_back_from_floats_unchanged():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1.0), levels)


def test_ends_middle_and_what_lies_outside_have_their_levels():
    x = torch.tensor([-1.0, 1.0, 0.0, -7.0, 7.0, float("inf"), -float("inf"), float("nan")])
    assert to_uint8(x).tolist() == [0, 255, 128, 0, 255, 255, 0, 0]


def test_levels_are_rounded_not_cut_off():
    assert to_uint8(torch.tensor([100.4, 100.6]) / 127.5 - 1.0).tolist() == [100, 101]


@pytest.mark.parametrize(("number", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (10, 3, 4), (12, 3, 4), (64, 8, 8)])
def test_grid_has_as_many_rows_as_the_root_of_the_number(number: int, rows: int, columns: int):
    grid = make_grid(made_images(number=number, channels=1, size=600))  # too large to be enlarged
    assert grid.shape == (1, rows * 602 - GAP_PIXELS, columns * 602 - GAP_PIXELS)


@pytest.mark.parametrize("number", [1, 2, 9, 10, 64, 100])
@pytest.mark.parametrize("size", [8, 16, 28, 64])
def test_grid_of_small_images_is_512_to_1024_pixels_wide(number: int, size: int):
    width = make_grid(made_images(number=number, channels=1, size=size)).shape[2]
    assert 512 <= width < 1024 + GAP_PIXELS * 10


def test_grid_shows_every_image_enlarged_in_reading_order_between_gaps():
    images = made_images(number=7, size=16)  # 2 rows of 4, factor 8
    grid, step = make_grid(images), 16 * 8 + GAP_PIXELS
    seen = torch.zeros(grid.shape[1:], dtype=torch.bool)
    for i, image in enumerate(images):
        y, x = i // 4 * step, i % 4 * step
        for dy, dx in ((0, 0), (7, 7), (3, 5)):
            assert torch.equal(grid[:, y + dy : y + 128 : 8, x + dx : x + 128 : 8], image)
        seen[y : y + 128, x : x + 128] = True
    assert grid.shape[1:] == (2 * step - GAP_PIXELS, 4 * step - GAP_PIXELS)
    assert torch.all(grid[:, ~seen] == GAP_LEVEL)


def test_grid_of_classes_has_a_row_for_each_with_its_name_to_the_left():
    images = made_images(number=6, size=200)  # three classes in turn, two images of each
    grid = make_grid(images, ["cat", "dog", "horse"])
    step, margin = 200 * 2 + GAP_PIXELS, grid.shape[2] - (2 * 200 * 2 + GAP_PIXELS)
    for i, image in enumerate(images):
        y, x = i % 3 * step, margin + i // 3 * step
        assert torch.equal(grid[:, y : y + 400 : 2, x : x + 400 : 2], image)
    for row in range(3):
        name = grid[:, row * step : row * step + 400, :margin]
        assert 0 < (name < 128).float().mean() < 0.2  # some ink on white


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_file_holds_the_grid(tmp_path: Path, channels: int):
    images = made_images(channels=channels)
    save_grid(tmp_path / "grids" / "0001.png", images)
    with Image.open(tmp_path / "grids" / "0001.png") as picture:
        assert picture.mode == {1: "L", 3: "RGB"}[channels]
        pixels = np.array(picture).reshape(picture.height, picture.width, channels)
    assert np.array_equal(pixels, make_grid(images).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["samples.npz", "samples"])
def test_images_come_back_from_npz_and_folder_unchanged(tmp_path: Path, name: str, channels: int):
    images = made_images(channels=channels, number=12)
    save_images(tmp_path / name, images)
    assert torch.equal(load_images(tmp_path / name), images)


def test_npz_holds_images_as_height_width_channels(tmp_path: Path):
    images = made_images()
    save_npz(tmp_path / "samples.npz", images)
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive.files == ["images"]
        assert np.array_equal(archive["images"], images.permute(0, 2, 3, 1).numpy())


def test_folder_numbers_its_files_with_six_digits(tmp_path: Path):
    save_folder(tmp_path / "samples", made_images(number=3))
    assert sorted(os.listdir(tmp_path / "samples")) == ["000000.png", "000001.png", "000002.png"]


def test_empty_folder_is_written_into(tmp_path: Path):
    (tmp_path / "samples").mkdir()
    save_folder(tmp_path / "samples", made_images(number=2))
    assert len(os.listdir(tmp_path / "samples")) == 2


@pytest.mark.parametrize("name", ["samples.npz", "samples.png", "samples"])
def test_interrupted_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    def fail(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_images(tmp_path / name, made_images())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("form", ["npz", "compressed", "fortran", "folder"])
def test_images_come_in_batches_in_order(tmp_path: Path, form: str):
    images, path = made_images(number=10), tmp_path / "images.npz"
    array = images.permute(0, 2, 3, 1).contiguous().numpy()
    if form == "compressed":
        np.savez_compressed(path, images=array)
    elif form == "fortran":
        np.savez(path, images=np.asfortranarray(array))
    else:
        save_images(path := path if form == "npz" else tmp_path / "images", images)
    stored = open_images(path)
    assert (stored.num, stored.shape) == (10, images.shape[1:])
    for _ in range(2):
        batches = list(stored.batches(4))
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert torch.equal(torch.cat(batches), images)


@pytest.mark.parametrize("name", ["images.npz", "images"])
def test_reading_holds_a_few_batches_and_not_all_images(tmp_path: Path, name: str):
    images = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)
    save_images(tmp_path / name, images)
    tracemalloc.start()
    assert sum(batch[0, 0, 0, 0].item() for batch in open_images(tmp_path / name).batches(8)) > 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < images.numel() / 4  # numpy's arrays and the bytes that were read; a batch is a 64th of them


def test_damage_behind_the_beginning_is_met_when_it_is_read(tmp_path: Path):
    save_npz(tmp_path / "a.npz", made_images(number=12))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read images from .*a\.npz: Bad CRC-32"):
        load_images(tmp_path / "a.npz")


def test_file_is_replaced_as_a_whole(tmp_path: Path):
    for number in (2, 3):
        save_images(tmp_path / "samples.npz", made_images(number=number))
    assert len(load_images(tmp_path / "samples.npz")) == 3
    assert os.listdir(tmp_path) == ["samples.npz"]


def test_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "000000.png").write_text("mine")
    for write in (save_folder, save_images):
        with pytest.raises(ValueError, match=r"the folder is not empty. Empty it, or choose another one"):
            write(tmp_path, made_images())
    assert (tmp_path / "000000.png").read_text() == "mine"


def test_file_in_the_place_of_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "samples").write_text("mine")
    for write in (save_folder, save_images):
        with pytest.raises(ValueError, match=r"it is a file; allowed: a name with \.npz"):
            write(tmp_path / "samples", made_images())
    assert (tmp_path / "samples").read_text() == "mine"


def test_folder_in_the_place_of_a_file_is_refused(tmp_path: Path):
    (tmp_path / "samples.npz").mkdir()
    with pytest.raises(ValueError, match="it is a folder"):
        check_destination(tmp_path / "samples.npz")


def test_unknown_extension_is_refused_with_the_allowed_ones(tmp_path: Path):
    with pytest.raises(ValueError, match=r"unknown extension \.jpg; allowed: a name with \.npz .*, \.png .* folder"):
        save_images(tmp_path / "samples.jpg", made_images())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "images", [made_images().float(), made_images()[:0], made_images()[0], made_images().repeat(1, 3, 1, 1)]
)
def test_what_is_no_batch_of_uint8_images_is_refused(tmp_path: Path, images: torch.Tensor):
    for name in ("samples.npz", "samples.png", "samples"):
        with pytest.raises(ValueError, match=r"expected uint8 \[N, C, H, W\]"):
            save_images(tmp_path / name, images)
    assert os.listdir(tmp_path) == []


def test_missing_and_foreign_files_are_refused_by_name(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.npz").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, reason in {
        "absent.npz": "no such file or folder",
        "notes.txt": "expected a .npz file or a folder of PNGs",
        "broken.npz": "cannot read images",
        "empty": "holds no .png file: only PNG is read",
    }.items():
        with pytest.raises(ValueError, match=reason) as caught:
            load_images(tmp_path / name)
        assert name in str(caught.value)


def test_npz_of_another_form_is_refused_with_what_it_holds(tmp_path: Path):
    np.savez(tmp_path / "a.npz", samples=np.zeros(3))
    with pytest.raises(ValueError, match="has no array named images, it has: samples"):
        load_images(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 3, 8, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"images is uint8 \[2, 3, 8, 8\], expected uint8 \[N, H, W, C\]"):
        load_images(tmp_path / "b.npz")


def test_npz_is_never_unpickled(tmp_path: Path):
    np.savez(tmp_path / "a.npz", images=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"images is object \[1\], expected uint8"):
        load_images(tmp_path / "a.npz")


def test_folder_of_unlike_images_is_refused_with_both_names(tmp_path: Path):
    for i, size in enumerate((8, 9)):
        Image.new("L", (size, size)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=r"1\.png has .*\(9, 9, 1\), but 0\.png has \(8, 8, 1\)"):
        load_images(tmp_path)


def test_png_with_transparency_is_refused(tmp_path: Path):
    Image.new("RGBA", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"0\.png has the pixel format RGBA, expected L \(8-bit grey\) or RGB"):
        load_images(tmp_path)


@pytest.mark.parametrize("check", [check_destination, check_animation])
def test_a_destination_below_a_file_is_refused_before_anything_is_drawn(tmp_path: Path, check: Callable[[Path], None]):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"/file is no folder; choose another place"):
        check(tmp_path / "file" / "a.png")
