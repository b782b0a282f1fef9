"""Pairs from files to the batches of a rank: both are resized and cropped alike, and stored without loss."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from data.prepare.command import main
from data.shards.index import load_index
from data.storage.location import DataError
from data.stream.pipeline import DataConfig, open_batches


def save(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def prepare(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers", "0"])


def first_batch(folder: Path, size: int, **form: int) -> np.ndarray:
    """uint8 [N, C, H, W], in no particular order."""
    index = load_index(folder)
    config = DataConfig(path=str(folder), image_size=16, loader_workers=0, **form)  # pyright: ignore[reportArgumentType]
    stream = open_batches(
        config, index, seed=0, global_batch_size=size, share=(0, size), micro_batch_size=size, first_batch=0
    )
    with closing(stream) as batches:
        return next(iter(batches)).images.numpy()


def test_a_batch_has_the_channels_of_the_image_and_then_those_that_are_given(tmp_path):
    given, wanted = noise(0, 16, 16), noise(1, 16, 16, 3)
    save(tmp_path / "a/1.png", given)
    save(tmp_path / "b/1.png", wanted)
    out = tmp_path / "out"
    assert prepare(f"pairs:{tmp_path}/a:{tmp_path}/b", "--out", out, "--size", 16, "--condition-channels", 1) == 0
    (planes,) = first_batch(out, 1, condition_channels=1)
    assert np.array_equal(planes[:3].transpose(1, 2, 0), wanted)
    assert np.array_equal(planes[3], given)
    assert main(["verify", str(out)]) == 0
    assert main(["inspect", str(out), "--sheet", str(tmp_path / "sheet.png")]) == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    height, width = sheet.shape[:2]
    assert width == 2 * height
    scale = height // 16
    assert np.array_equal(sheet[::scale, : width // 2 : scale], given[:, :, None].repeat(3, axis=2))
    assert np.array_equal(sheet[::scale, width // 2 :: scale], wanted)


def test_a_wide_pair_is_cropped_alike_and_a_smaller_condition_is_enlarged(tmp_path):
    wanted = np.zeros((32, 64, 3), dtype=np.uint8)
    wanted[:, 8:56] = 200  # the middle square, and what a filter takes in around it
    save(tmp_path / "b/1.png", wanted)
    save(tmp_path / "a/1.png", wanted[::4, ::4])  # 8 x 16
    out = tmp_path / "out"
    assert prepare(f"pairs:{tmp_path}/a:{tmp_path}/b", "--out", out, "--size", 16) == 0
    assert (first_batch(out, 1, condition_channels=3) == 200).all()


def test_halves_of_one_file_are_a_pair(tmp_path):
    left, right = noise(0, 16, 16, 3), noise(1, 16, 16, 3)
    save(tmp_path / "a/1.png", np.concatenate([left, right], axis=1))
    for side, wanted, given in (("left", right, left), ("right", left, right)):
        out = tmp_path / side
        assert prepare(f"pairs:{tmp_path}/a", "--side-by-side", side, "--out", out, "--size", 16) == 0
        (planes,) = first_batch(out, 1, condition_channels=3)
        assert np.array_equal(planes[:3].transpose(1, 2, 0), wanted)
        assert np.array_equal(planes[3:].transpose(1, 2, 0), given)


def test_conditions_of_five_channels_of_16_bits_are_arrays(tmp_path):
    (tmp_path / "a").mkdir()
    given = np.random.default_rng(0).integers(0, 2**16, (16, 16, 5), dtype=np.uint16)
    np.save(tmp_path / "a/1.npy", given)
    save(tmp_path / "b/1.png", noise(1, 16, 16))
    out = tmp_path / "out"
    source = f"pairs:{tmp_path}/a:{tmp_path}/b"
    assert prepare(source, "--out", out, "--size", 16, "--channels", 1, "--condition-channels", 5) == 0
    (planes,) = first_batch(out, 1, condition_channels=5, image_channels=1)
    assert np.array_equal(planes[1:].transpose(1, 2, 0), given >> 8)


@pytest.mark.parametrize("channels", [2, 4, 5, 8])
def test_conditions_of_many_channels_are_tiff_files(tmp_path, channels):
    (tmp_path / "a").mkdir()
    given = np.random.default_rng(0).integers(0, 2**16, (16, 16, channels), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a/1.tif", given, photometric="minisblack", planarconfig="contig")
    save(tmp_path / "b/1.png", noise(1, 16, 16, 3))
    out, source = tmp_path / "out", f"pairs:{tmp_path}/a:{tmp_path}/b"
    assert prepare(source, "--out", out, "--size", 16, "--condition-channels", channels) == 0
    (planes,) = first_batch(out, 1, condition_channels=channels)
    assert np.array_equal(planes[3:].transpose(1, 2, 0), given >> 8)


def test_three_planes_of_16_bits_and_an_alpha_channel_are_channels_of_conditions(tmp_path, capsys):
    (tmp_path / "planes").mkdir()
    wide = np.random.default_rng(0).integers(0, 2**16, (3, 16, 16), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "planes/1.tif", wide, photometric="rgb", planarconfig="separate")
    save(tmp_path / "alpha/1.png", noise(2, 16, 16, 4))
    save(tmp_path / "b/1.png", noise(1, 16, 16, 3))
    wanted = {"planes": wide >> 8, "alpha": noise(2, 16, 16, 4).transpose(2, 0, 1)}
    for name, planes in wanted.items():
        out, source, number = tmp_path / f"out-{name}", f"pairs:{tmp_path}/{name}:{tmp_path}/b", len(planes)
        assert prepare(source, "--out", out, "--size", 16, "--condition-channels", number) == 0
        assert np.array_equal(first_batch(out, 1, condition_channels=number)[0, 3:], planes)
    source = f"pairs:{tmp_path}/alpha:{tmp_path}/b"
    assert prepare(source, "--out", tmp_path / "new", "--size", 16, "--condition-channels", 5) == 1
    told = "1.png its condition has 4 channels, expected are 5; TIFF and .npy files can hold them"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((8, 8, 2), dtype=np.uint8), "its condition has the shape [8, 8, 2], expected is [height, width, 5]"),
        (np.zeros((8, 8, 5), dtype=np.float32), "its condition has numbers of type float32 without an agreed range"),
        (np.zeros((8, 12, 5), dtype=np.uint8), "its condition has another shape: 12x8, the image has 16x16"),
        (np.array([[{}]], dtype=object), "its condition has the shape [1, 1], expected is [height, width, 5]"),
        (np.zeros((2, 3, 5), dtype=np.uint8), "its condition has another shape: 3x2, the image has 16x16"),
    ],
)
def test_a_condition_that_cannot_be_used_is_named_with_its_image(tmp_path, capsys, array, told):
    (tmp_path / "a").mkdir()
    np.save(tmp_path / "a/1.npy", array, allow_pickle=True)
    save(tmp_path / "b/1.png", noise(1, 16, 16, 3))
    source = f"pairs:{tmp_path}/a:{tmp_path}/b"
    assert prepare(source, "--out", tmp_path / "out", "--size", 16, "--condition-channels", 5) == 1
    assert f"1.png {told}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("side", "told"),
    [(10**8, "more than 200000000"), (9, "is damaged: it does not have the 81 numbers that it states")],
)
def test_what_the_header_of_an_array_states_is_not_allocated(tmp_path, capsys, side, told):
    (tmp_path / "a").mkdir()
    with (tmp_path / "a/1.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (side, side)})
    save(tmp_path / "b/1.png", noise(1, 16, 16, 3))
    source = f"pairs:{tmp_path}/a:{tmp_path}/b"
    assert prepare(source, "--out", tmp_path / "out", "--size", 16, "--condition-channels", 1) == 1
    assert told in capsys.readouterr().err


def test_arrays_of_either_order_of_bytes_and_axes_are_the_same(tmp_path):
    given = np.random.default_rng(0).integers(0, 2**16, (16, 16, 2), dtype=np.uint16)
    found = []
    for name, array in (("plain", given), ("swapped", given.astype(">u2")), ("fortran", np.asfortranarray(given))):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "1.npy", array)
        save(tmp_path / "b/1.png", noise(1, 16, 16, 3))
        out, source = tmp_path / f"out-{name}", f"pairs:{tmp_path}/{name}:{tmp_path}/b"
        assert prepare(source, "--out", out, "--size", 16, "--condition-channels", 2) == 0
        found.append(first_batch(out, 1, condition_channels=2)[0, 3:].transpose(1, 2, 0))
    assert all(np.array_equal(x, given >> 8) for x in found)


def test_other_conditions_of_the_same_names_and_sizes_are_another_data_set(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    np.save(tmp_path / "a/1.npy", noise(0, 16, 16))
    save(tmp_path / "b/1.png", noise(1, 16, 16, 3))
    line = (f"pairs:{tmp_path}/a:{tmp_path}/b", "--out", tmp_path / "out", "--size", 16, "--condition-channels", 1)
    assert prepare(*line) == 0
    assert prepare(*line) == 0
    np.save(tmp_path / "a/1.npy", noise(2, 16, 16))
    assert prepare(*line) == 2
    assert "holds a data set of other images" in capsys.readouterr().err


def test_an_index_without_pairs_has_no_entry_for_them_and_config_and_data_must_agree(tmp_path):
    assert prepare("digits4x", "--out", tmp_path / "pairs", "--max-images", 8) == 0
    assert prepare("digits", "--out", tmp_path / "digits", "--max-images", 8) == 0
    assert "condition_channels" not in (tmp_path / "digits/index.json").read_text()
    with pytest.raises(DataError, match=r"data\.condition_channels is 0, but the data set at .* was prepared with 1"):
        first_batch(tmp_path / "pairs", 4, image_channels=1)
    with pytest.raises(DataError, match=r"data\.condition_channels is 1, but the data set at .* was prepared with 0"):
        first_batch(tmp_path / "digits", 4, image_channels=1, condition_channels=1)


def test_condition_channels_are_for_pairs(tmp_path, capsys):
    assert prepare("digits", "--out", tmp_path / "out", "--condition-channels", 1) == 2
    assert "--condition-channels 1 is given, but digits has no conditions" in capsys.readouterr().err


def write_channels(folder: Path, kind: str, array: np.ndarray) -> Path:
    """One image of some channels, [H, W, C], in a file of a kind."""
    folder.mkdir(parents=True)
    if kind == "npy":
        np.save(folder / "1.npy", array)
    elif kind == "tif":
        tifffile.imwrite(folder / "1.tif", array, photometric="minisblack", planarconfig="contig")
    elif kind == "pages":
        tifffile.imwrite(folder / "1.tif", np.moveaxis(array, -1, 0).copy(), photometric="minisblack")
    else:
        Image.fromarray(array if array.shape[2] > 1 else array[..., 0]).save(folder / "1.png")
    return folder


@pytest.mark.parametrize(
    ("kind", "channels", "dtype"),
    [
        *((kind, channels, dtype) for kind in ("npy", "tif") for channels in (2, 5, 8) for dtype in ("u1", "u2")),
        ("npy", 1, "u2"),
        ("npy", 3, "u1"),
        ("pages", 6, "u2"),
        ("png", 1, "u2"),
        ("png", 2, "u1"),
        ("png", 4, "u1"),
    ],
)
def test_images_of_one_to_eight_channels_of_8_or_16_bits(tmp_path, kind, channels, dtype):
    bits = 8 * np.dtype(dtype).itemsize
    wanted = np.random.default_rng(0).integers(0, 2**bits, (16, 16, channels)).astype(dtype)
    write_channels(tmp_path / "b", kind, wanted)
    save(tmp_path / "a/1.png", noise(1, 16, 16))
    out, source = tmp_path / "out", f"pairs:{tmp_path}/a:{tmp_path}/b"
    assert prepare(source, "--out", out, "--size", 16, "--channels", channels, "--condition-channels", 1) == 0
    index = load_index(out)
    assert (index.image_channels, index.condition_channels, index.version) == (channels, 1, 2)
    (planes,) = first_batch(out, 1, image_channels=channels, condition_channels=1)
    assert np.array_equal(planes[:channels].transpose(1, 2, 0), wanted >> (bits - 8))
    assert np.array_equal(planes[channels], noise(1, 16, 16))


def test_images_of_five_channels_are_cropped_and_resized_like_their_conditions(tmp_path):
    wide = np.zeros((32, 64, 5), dtype=np.uint8)
    wide[:, 8:56] = np.arange(40, 240, 40)  # the middle square, and what a filter takes in around it
    write_channels(tmp_path / "b", "npy", wide)
    write_channels(tmp_path / "a", "npy", wide[::4, ::4])
    out, source = tmp_path / "out", f"pairs:{tmp_path}/a:{tmp_path}/b"
    assert prepare(source, "--out", out, "--size", 16, "--channels", 5, "--condition-channels", 5) == 0
    (planes,) = first_batch(out, 1, image_channels=5, condition_channels=5)
    assert (planes == np.tile(np.arange(40, 240, 40), 2)[:, None, None]).all()
    assert (out / "origin.json").is_file()


def test_images_of_five_channels_are_inspected_verified_and_merged(tmp_path, capsys):
    outs = []
    for number in range(2):
        folder = tmp_path / str(number)
        write_channels(folder / "b", "npy", noise(number, 16, 16, 5))
        save(folder / "a/1.png", noise(9, 16, 16, 3))
        outs.append(folder / "out")
        line = (f"pairs:{folder}/a:{folder}/b", "--out", outs[-1], "--size", 16, "--channels", 5)
        assert prepare(*line) == 0
    assert "1 images 16x16x5, each with a condition of 3 channels" in capsys.readouterr().out
    assert main(["merge", *map(str, outs), "--out", str(tmp_path / "both")]) == 0
    assert main(["verify", str(tmp_path / "both")]) == 0
    sheet = tmp_path / "sheet.png"
    assert main(["inspect", str(tmp_path / "both"), "--sheet", str(sheet), "--against", str(outs[0])]) == 0
    told = capsys.readouterr().out
    assert "form          16x16, 5 channels" in told
    assert "near          1 of 2 images have a near-duplicate" in told
    with Image.open(sheet) as picture:
        pixels = np.asarray(picture)
    scale = pixels.shape[1] // (6 * 16)
    rows = pixels[:: scale * 16 + 2][:2], pixels[::scale, ::scale][:16]
    assert len(rows[0]) == 2  # two rows of six tiles
    assert np.array_equal(rows[1][:, 16:32, 0], noise(0, 16, 16, 5)[..., 0]) or np.array_equal(
        rows[1][:, 16:32, 0], noise(1, 16, 16, 5)[..., 0]
    )


def test_filters_look_at_images_of_many_channels(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    for number, (side, seed) in enumerate(((16, 0), (16, 0), (16, 1), (32, 2))):
        array = np.asarray(Image.fromarray(noise(seed, 8, 8)).resize((side, side)))
        np.save(tmp_path / f"b/{number}.npy", np.stack([array] * 5, axis=2))
        save(tmp_path / f"a/{number}.png", array)
    source, out = f"pairs:{tmp_path}/a:{tmp_path}/b", tmp_path / "out"
    line = (source, "--size", 16, "--channels", 5, "--condition-channels", 1, "--out")
    assert prepare(*line, out, "--dedup", "perceptual") == 0
    assert load_index(out).num_samples == 3
    assert prepare(*line, tmp_path / "large", "--min-side", 20) == 0
    assert load_index(tmp_path / "large").num_samples == 1
    assert "--min-side 20: 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.zeros((16, 16, 4), dtype=np.uint8), "1.npy has the shape [16, 16, 4], expected is [height, width, 5]"),
        (np.zeros((16, 16, 5), dtype=np.float32), "1.npy has numbers of type float32 without an agreed range"),
        (np.zeros((8, 8, 5), dtype=np.uint8), "1.npy is too small: 8x8, the short side must be at least 16"),
        (np.zeros((20, 16, 5), dtype=np.uint8), "1.npy its condition has another shape: 16x16, the image has 16x20"),
    ],
)
def test_an_array_that_cannot_be_used_is_named(tmp_path, capsys, array, told):
    write_channels(tmp_path / "b", "npy", array)
    save(tmp_path / "a/1.png", noise(1, 16, 16))
    source = f"pairs:{tmp_path}/a:{tmp_path}/b"
    line = (source, "--out", tmp_path / "out", "--size", 16, "--channels", 5, "--condition-channels", 1)
    assert prepare(*line) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("digits", "--channels", 5), "--channels 5 is given, but digits has no conditions: other images"),
        (("pairs:{}/a", "--side-by-side", "left", "--channels", 5), "--channels 5 is given; halves of image files"),
        (("pairs:{0}/a:{0}/a", "--channels", 9), "'9' is given, allowed is a whole number of 1 to 8"),
    ],
)
def test_channels_that_a_source_cannot_have_are_refused(tmp_path, capsys, arguments, told):
    save(tmp_path / "a/1.png", noise(1, 16, 32, 3))
    line = (str(arguments[0]).format(tmp_path), *arguments[1:])
    assert prepare(*line, "--out", tmp_path / "out", "--size", 16) == 2
    assert told in capsys.readouterr().err
