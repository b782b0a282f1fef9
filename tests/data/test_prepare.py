"""The command: what it makes, that it may run twice, and that a failure leaves nothing behind."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data.writer
from data.pipeline import DataConfig, open_batches
from data.prepare import main
from data.shards import load_index, verify_present

Refusal = Callable[..., str]
ROOT = Path(__file__).resolve().parents[2]


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_digits_need_no_options(tmp_path: Path) -> None:
    assert run("digits", "--out", tmp_path / "deep" / "digits") == 0
    index = load_index(tmp_path / "deep" / "digits")
    verify_present(index)
    assert (index.num_samples, index.image_size, index.image_channels, index.num_classes) == (1797, 16, 1, 10)
    assert index.source == "digits"
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["digits"]


def test_prepared_images_keep_their_labels(class_folder: Path, tmp_path: Path) -> None:
    assert run(class_folder, "--out", tmp_path / "set", "--size", 8) == 0
    index = load_index(tmp_path / "set")
    config = DataConfig(path=str(tmp_path / "set"), image_size=8, loader_workers=0)
    with open_batches(
        config, index, seed=0, global_batch_size=40, share=(0, 40), micro_batch_size=40, first_batch=0
    ) as batches:
        batch = next(batches)
    assert sorted(key[:9] for key in batch.keys) == [f"{number:09d}" for number in range(40)]
    assert (batch.images[:, 0, 4, 4] == batch.labels * 200).all()
    for key, image in zip(batch.keys, batch.images, strict=True):
        # The key ends in the name of the file, and that in the number that the colour tells.
        assert image[1, 4, 4] == int(key[-2:]) * 6


def test_same_command_gives_the_same_bytes_with_any_number_of_workers(class_folder: Path, tmp_path: Path) -> None:
    command = (class_folder, "--size", 8, "--shard-samples", 7)
    assert run(*command, "--out", tmp_path / "one", "--workers", 0) == 0
    assert run(*command, "--out", tmp_path / "two", "--workers", 2) == 0
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert [shard.num_samples for shard in load_index(tmp_path / "one").shards] == [7, 7, 7, 7, 7, 5]


def test_seed_changes_the_order_but_not_the_samples(class_folder: Path, tmp_path: Path) -> None:
    assert run(class_folder, "--out", tmp_path / "one", "--size", 8) == 0
    assert run(class_folder, "--out", tmp_path / "two", "--size", 8, "--seed", 1) == 0
    one, two = (hashes(tmp_path / name)["00000.tar"] for name in ("one", "two"))
    assert one != two
    assert load_index(tmp_path / "one").num_samples == load_index(tmp_path / "two").num_samples


def test_shard_mb_bounds_the_size_of_a_shard(tmp_path: Path) -> None:
    assert run("digits", "--out", tmp_path / "set", "--shard-mb", 1) == 0
    sizes = [shard.num_bytes for shard in load_index(tmp_path / "set").shards]
    assert len(sizes) > 2
    assert all(10**6 <= size < 1.05 * 10**6 for size in sizes[:-1])


def test_second_run_finds_the_work_done(class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (class_folder, "--out", tmp_path / "set", "--size", 8)
    assert run(*command) == 0
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").iterdir()}
    capsys.readouterr()
    assert run(*command, "--workers", 0) == 0
    assert "already holds this data set (40 images); nothing to do" in capsys.readouterr().out
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").iterdir()} == before


def test_empty_folder_is_taken_and_gets_ordinary_permissions(class_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    assert run(class_folder, "--out", tmp_path / "set", "--size", 8) == 0
    assert (tmp_path / "set").stat().st_mode & 0o777 == tmp_path.stat().st_mode & 0o777 | 0o755 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_other_data_in_the_way_is_refused_and_kept(class_folder: Path, tmp_path: Path, refusal: Refusal) -> None:
    out = tmp_path / "set"
    assert run(class_folder, "--out", out, "--size", 8) == 0
    before = hashes(out)
    told = refusal(class_folder, "--out", out, "--size", 12, "--seed", 3)
    assert "holds another prepared data set (seed is 0 there, 3 here, size is 8 there, 12 here)" in told
    assert "source is folder:" in refusal("digits", "--out", out, "--size", 8)
    other = tmp_path / "copy" / class_folder.name
    shutil.copytree(class_folder, other)
    (other / "cat" / "00.png").unlink()
    assert "the files of the source were not the same" in refusal(other, "--out", out, "--size", 8)
    assert hashes(out) == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "holds other files; choose another --out" in refusal("digits", "--out", tmp_path / "mine")
    assert f"--out {tmp_path}/mine/thesis.txt is a file" in refusal("digits", "--out", tmp_path / "mine" / "thesis.txt")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_damaged_result_in_the_way_is_named(class_folder: Path, tmp_path: Path, refusal: Refusal) -> None:
    command = (class_folder, "--out", tmp_path / "set", "--size", 8)
    assert run(*command) == 0
    (tmp_path / "set" / "00000.tar").unlink()
    assert "holds a damaged data set: shard 00000.tar: cannot read" in refusal(*command)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/no/such", "--size", "8"], "source /no/such: no such file or folder; allowed are"),
        (["digits", "--size", "3"], "--size: '3' is given, allowed is a whole number of 4 or more"),
        (["digits", "--size", "big"], "--size: 'big' is given"),
        (["digits", "--channels", "2"], "--channels: invalid choice: 2"),
        (["digits", "--max-bad", "120"], "--max-bad: '120' is given, allowed is a percentage of 0 to 100"),
        (["digits", "--seed", "-1"], "--seed: '-1' is given, allowed is a whole number of 0 to 18446744073709551615"),
        (["digits", "--shard-mb", "5", "--shard-samples", "5"], "not allowed with argument --shard-mb"),
        (["digits", "--siez", "8"], "unrecognized arguments: --siez 8"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    tmp_path: Path, refusal: Refusal, arguments: list[str], told: str
) -> None:
    assert told in refusal(*arguments, "--out", tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_folder_needs_a_size(class_folder: Path, tmp_path: Path, refusal: Refusal) -> None:
    told = refusal(class_folder, "--out", tmp_path / "set")
    assert f"--size is missing: folder:{class_folder.name} has no default; give one of 4 or more, e.g. 64" in told


@pytest.fixture
def flawed(tmp_path: Path) -> Path:
    """Twenty images, of which one is text and one is too small."""
    root = tmp_path / "flawed"
    root.mkdir()
    for number in range(18):
        Image.fromarray(np.full((16, 16), number, dtype=np.uint8)).save(root / f"{number:02d}.png")
    (root / "text.png").write_text("text")
    Image.new("L", (5, 5)).save(root / "tiny.png")
    return root


def test_bad_images_past_the_limit_fail_with_their_names(flawed: Path, tmp_path: Path, refusal: Refusal) -> None:
    told = refusal(flawed, "--out", tmp_path / "set", "--size", 8, "--max-bad", "5", code=1)
    assert "2 of 20 images are unusable, --max-bad 5 allows 1; mend or remove them" in told
    assert "text.png is no image of a known format" in told
    assert "tiny.png is too small: 5x5, the short side must be at least 8" in told
    assert [file.name for file in tmp_path.iterdir()] == ["flawed"]


def test_bad_images_within_the_limit_are_named_and_left_out(
    flawed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(flawed, "--out", tmp_path / "set", "--size", 8, "--max-bad", "10%") == 0
    told = capsys.readouterr().out
    assert "2 unusable images were left out:" in told
    assert "text.png is no image" in told
    assert load_index(tmp_path / "set").num_samples == 18


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Linux's always full device, in place of the file of the first shard.
    new_stream = data.writer.HashingFile.__init__

    def full_stream(self: data.writer.HashingFile, _: Path) -> None:
        new_stream(self, Path("/dev/full"))

    path_open = Path.open
    monkeypatch.setattr(data.writer.HashingFile, "__init__", full_stream)
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", **options: path_open(self, mode.replace("x", "w"), **options)
    )
    told = refusal("digits", "--out", tmp_path / "deep" / "set", code=1)
    assert told == (
        "data.prepare: the disk of --out is full; nothing is left behind: free some space or choose another disk\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_folder_that_appears_meanwhile_is_not_replaced(
    class_folder: Path, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"

    def write_index_late(folder: Path, document: Any) -> None:
        write_index(folder, document)
        out.mkdir()
        (out / "other.txt").write_text("mine")

    write_index = data.writer.write_index
    monkeypatch.setattr(data.writer, "write_index", write_index_late)
    assert "Directory not empty" in refusal(class_folder, "--out", out, "--size", 8, code=1)
    assert [file.name for file in tmp_path.rglob("*")] == ["set", "other.txt"]


@pytest.mark.parametrize(("workers", "how"), [(0, signal.SIGTERM), (2, signal.SIGINT)])
def test_interrupted_command_leaves_nothing(tmp_path: Path, workers: int, how: signal.Signals) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3000):
        (source / f"{number}.png").symlink_to("one.image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)).save(
        source / "one.image", "PNG"
    )
    command = [
        sys.executable,
        "-m",
        "data.prepare",
        str(source),
        "--out",
        str(tmp_path / "out" / "set"),
        "--size",
        "64",
    ]
    process = subprocess.Popen(
        [*command, "--workers", str(workers)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A suite that was started in the background of a shell inherits an ignored SIGINT; a user's command does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.set.unfinished-*/*.tar")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # As a terminal does it: to every process of the command.
    os.killpg(process.pid, how)
    told = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert told == "data.prepare: interrupted; nothing is left behind, run the same command again\n"
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_index_holds_no_path_of_this_machine(class_folder: Path, tmp_path: Path) -> None:
    assert run(class_folder, "--out", tmp_path / "set", "--size", 8) == 0
    content = (tmp_path / "set" / "index.json").read_text()
    assert str(class_folder.parent) not in content
    assert json.loads(content)["source"] == f"folder:{class_folder.name}"


def test_real_photographs_are_prepared_without_a_bad_one(photos: Path, tmp_path: Path) -> None:
    subset = tmp_path / "photos"
    subset.mkdir()
    for file in sorted(photos.glob("*.jpg"))[:60]:
        (subset / file.name).symlink_to(file)
    assert run(subset, "--out", tmp_path / "set", "--size", 64, "--max-bad", "0", "--workers", 0) == 0
    index = load_index(tmp_path / "set")
    config = DataConfig(path=str(tmp_path / "set"), image_size=64, loader_workers=0)
    with open_batches(
        config, index, seed=0, global_batch_size=60, share=(0, 60), micro_batch_size=60, first_batch=0
    ) as batches:
        images = next(batches).images.float()
    assert images.shape == (60, 3, 64, 64)
    assert images.std() > 30  # photographs, not flat pictures
