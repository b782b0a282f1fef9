"""The summary says what the index and the shards hold, and the sheet shows images of theirs."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data.prepare.command import main
from data.sets.inspect import contact_sheet, sheet_samples
from data.shards.index import ShardIndex, load_index
from tests.launch import ROOT

Refusal = Callable[..., str]


def images_of(index: ShardIndex) -> list[npt.NDArray[np.uint8]]:
    """All images in their order, read by other means than the program's."""
    images = []
    for shard in index.shards:
        with tarfile.open(index.directory / shard.name) as archive:
            for member in archive:
                if not member.name.endswith(".cls"):
                    content = archive.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
                    images.append(np.asarray(Image.open(io.BytesIO(content))))
    return images


def test_summary_says_what_was_prepared(
    prepared: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(prepared.directory), "--sheet", str(tmp_path / "sheet.png")]) == 0
    captured = capsys.readouterr()
    num_bytes = sum(file.stat().st_size for file in prepared.directory.glob("*.tar"))
    assert captured.out.splitlines() == [
        f"location      {prepared.directory}",
        f"source        {prepared.source}",
        "options       size 8, channels 3, upscale False, shard_samples 5, seed 0",
        "images        40",
        "form          8x8, RGB",
        "classes       2",
        "       0  cat: 20 (50.0%)",
        "       1  dog: 20 (50.0%)",
        "originals     short side 20 to 22 px, median 21",
        "      16 to 31            40 (100.0%)  " + 30 * "#",
        "shards        8 of 5 images each",
        f"bytes         {num_bytes}, {num_bytes / 40:.0f} per image with its tar header",
        "format        ddgan-shards version 2",
        f"digest        {prepared.digest}",
        f"sheet         {tmp_path}/sheet.png (40 images)",
    ]
    assert captured.err == ""


def test_data_set_of_version_1_has_the_same_summary_but_for_its_version(
    prepared: ShardIndex, version_1: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    shutil.copy(prepared.directory / "origin.json", version_1.directory)
    for index in (prepared, version_1):
        assert main(["inspect", str(index.directory), "--sheet", str(tmp_path / "sheet.png")]) == 0
        shown.append(capsys.readouterr().out.replace(index.location, "DIR"))
    assert shown[0].replace("version 2", "version 1") == shown[1] != shown[0]


def test_sheet_shows_the_images_of_the_shards(prepared: ShardIndex, tmp_path: Path) -> None:
    assert main(["inspect", str(prepared.directory), "--sheet", str(tmp_path / "sheet.png")]) == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    # 40 images in 6 rows of 7, the last cells empty; 7 * 8 pixels enlarged ten times are the first to reach 512.
    assert sheet.shape == (6 * 82 - 2, 7 * 82 - 2, 3)
    for number, image in enumerate(images_of(prepared)):
        y, x = number // 7 * 82, number % 7 * 82
        assert np.array_equal(sheet[y : y + 80 : 10, x : x + 80 : 10], image)
        assert np.array_equal(sheet[y + 9 : y + 80 : 10, x + 9 : x + 80 : 10], image)
        assert (sheet[y + 80 : y + 82, x : x + 80] == 128).all()
    assert (sheet[-80:, 5 * 82 :] == 128).all()


def test_sheet_of_many_images_is_spread_evenly_over_the_shards(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert main(["digits", "--out", str(out), "--shard-samples", "300", "--workers", "0"]) == 0
    index = load_index(out)
    assert main(["inspect", str(out), "--sheet", str(tmp_path / "sheet.png")]) == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    images = images_of(index)
    places = sheet_samples(index.num_samples)
    assert len(places) == 64
    assert {np.diff(places).min(), np.diff(places).max()} == {28, 29}
    for number, place in enumerate(places):
        y, x = number // 8 * 66, number % 8 * 66
        assert np.array_equal(sheet[y : y + 64 : 4, x : x + 64 : 4], images[place])


@pytest.mark.parametrize("num_samples", [1, 2, 63, 64, 65, 1797, 3_000_000])
def test_samples_of_a_sheet_are_distinct_and_of_the_data_set(num_samples: int) -> None:
    places = sheet_samples(num_samples)
    assert len(set(places)) == len(places) == min(64, num_samples)
    assert places == sorted(places)
    assert places[0] >= 0
    assert places[-1] < num_samples
    # As far from the end as from the start.
    assert abs(places[0] - (num_samples - 1 - places[-1])) <= 1


def test_names_of_classes_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat", "dog\n\x1b[31mred"):
        (tmp_path / "source" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "source" / name / "1.png")
    assert main([str(tmp_path / "source"), "--out", str(tmp_path / "set"), "--size", "8"]) == 0
    assert main(["inspect", str(tmp_path / "set"), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert "       1  dog\\n\\x1b[31mred: 1 (50.0%)\n" in capsys.readouterr().out


def test_large_images_are_reduced_on_the_sheet(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for number in range(4):
        Image.new("L", (300, 300), 60 * number).save(tmp_path / "source" / f"{number}.png")
    command = [str(tmp_path / "source"), "--out", str(tmp_path / "set"), "--size", "300", "--channels", "1"]
    assert main(command) == 0
    assert main(["inspect", str(tmp_path / "set"), "--sheet", str(tmp_path / "sheet.png")]) == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 258 - 2, 2 * 258 - 2)
    assert sorted(sheet[100::258, 100::258].ravel().tolist()) == pytest.approx([0, 60, 120, 180], abs=1)


def test_single_large_image_is_a_sheet_of_its_own() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 600, 600, 3), dtype=np.uint8)
    assert np.array_equal(contact_sheet(image), image[0])


def test_sheet_goes_to_the_current_folder_by_default_and_is_replaced(
    prepared: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "contact-sheet-set.png"
    file.write_text("yesterday's")
    assert main(["inspect", str(prepared.directory)]) == 0
    assert Image.open(file).format == "PNG"
    assert [found.name for found in tmp_path.iterdir()] == [file.name]
    monkeypatch.chdir(prepared.directory)
    assert main(["inspect", ".", "--sheet", str(tmp_path / "dot.png")]) == 0


def test_many_classes_are_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(60):
        file = tmp_path / "source" / f"class{number % 25:02d}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(file)
    assert main([str(tmp_path / "source"), "--out", str(tmp_path / "set"), "--size", "8", "--channels", "1"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "set"), "--sheet", str(tmp_path / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = lines.index("classes       25")
    assert lines[first + 1] == "       0  class00: 3 (5.0%)"
    assert lines[first + 18] == "      17  class17: 2 (3.3%)"
    assert lines[first + 19] == "  and 7 more with 2 to 2 images each"
    assert lines[first + 20].startswith("originals ")


def test_data_set_without_classes_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    Image.new("L", (8, 8), 7).save(tmp_path / "source" / "0.png")
    assert main([str(tmp_path / "source"), "--out", str(tmp_path / "set"), "--size", "8"]) == 0
    assert main(["inspect", str(tmp_path / "set"), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert "\nclasses       none\n" in capsys.readouterr().out
    assert (np.asarray(Image.open(tmp_path / "sheet.png")) == 7).all()


def test_labels_that_the_index_does_not_allow_are_counted(
    own_copy: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = own_copy.directory / "index.json"
    content = json.loads(file.read_text())
    content.update(num_classes=1, class_names=["cat"])
    file.write_text(json.dumps(content))
    assert main(["inspect", str(own_copy.directory), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert "wrong or no label: 20; python -m data.prepare verify names them" in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(prepared: ShardIndex, tmp_path: Path, refusal: Refusal) -> None:
    assert f"no prepared data set at {tmp_path}/gone" in refusal("inspect", tmp_path / "gone")
    told = refusal("inspect")
    assert "arguments are required: DIR; see python -m data.prepare inspect --help" in told
    assert "give a name that ends in .png" in refusal("inspect", prepared.directory, "--sheet", tmp_path / "a.jpg")
    (tmp_path / "folder.png").mkdir()
    assert "is a folder; name a file" in refusal("inspect", prepared.directory, "--sheet", tmp_path / "folder.png")
    told = refusal("inspect", prepared.directory, "--sheet", tmp_path / "no" / "a.png")
    assert f"there is no folder {tmp_path}/no; make it" in told
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


def test_damaged_shard_is_named_and_no_sheet_is_left(own_copy: ShardIndex, tmp_path: Path, refusal: Refusal) -> None:
    (own_copy.directory / "00003.tar").unlink()
    told = refusal("inspect", own_copy.directory, "--sheet", tmp_path / "sheet.png", code=1)
    assert "shard 00003.tar: cannot open" in told
    assert not (tmp_path / "sheet.png").exists()


def test_commands_start_without_torch() -> None:
    program = (
        "import sys; import data.prepare, data.sets.inspect, data.sets.verify; "
        "sys.exit(' '.join(sorted({'torch', 'webdataset', 'sklearn'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
