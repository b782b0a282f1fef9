"""The command: what it makes, that it may run twice, and that a failure leaves nothing behind."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from PIL import Image

import data.prepare.command
import data.prepare.places
from data.prepare.command import main
from data.shards.index import load_index, verify_present
from data.shards.reader import EncodedSample, samples_in_order
from data.shards.writer import write_index
from data.sources.find import open_source
from data.sources.source import Source
from data.stream.pipeline import DataConfig, open_batches
from tests.launch import ROOT

Refusal = Callable[..., str]


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


def samples_of(folder: Path) -> list[EncodedSample]:
    index = load_index(folder)
    return list(samples_in_order(index.shards, lambda shard: os.open(folder / shard.name, os.O_RDONLY)))


def test_seed_changes_the_order_but_not_the_samples(class_folder: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        assert run(class_folder, "--out", tmp_path / str(seed), "--size", 8, "--seed", seed) == 0
    one, two = (samples_of(tmp_path / str(seed)) for seed in (0, 1))
    assert one != two
    by_key = [sorted(samples, key=lambda sample: sample.key) for samples in (one, two)]
    assert by_key[0] == by_key[1]
    # Keys begin with the number of the image within the source: neither order is the source's, and classes are mixed.
    assert len({sample.key for sample in one}) == 40
    for samples, in_source in zip((one, two), by_key, strict=True):
        assert samples != in_source
        assert {sample.label for sample in samples[:20]} == {0, 1}


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


def test_class_whose_name_is_no_text_is_refused(class_folder: Path, tmp_path: Path, refusal: Refusal) -> None:
    shutil.copytree(class_folder, tmp_path / "source")
    os.rename(tmp_path / "source" / "cat", os.fsencode(tmp_path / "source") + b"/caf\xe9")
    told = refusal(tmp_path / "source", "--out", tmp_path / "set", "--size", 8)
    assert "source folder:source: the name caf\\udce9 is no UTF-8, which index.json needs; rename it" in told
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_first_images_of_a_source_are_another_data_set(class_folder: Path, tmp_path: Path, refusal: Refusal) -> None:
    command = (class_folder, "--out", tmp_path / "set", "--size", 8)
    assert run(*command, "--max-images", 10) == 0
    index = load_index(tmp_path / "set")
    assert (index.num_samples, index.options["max_images"]) == (10, 10)
    assert run(*command, "--max-images", 10) == 0
    assert "(max_images is 10 there, None here)" in refusal(*command)
    assert "(max_images is 10 there, 11 here)" in refusal(*command, "--max-images", 11)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Thirty images for training and twenty for tests, in the form of MNIST."""
    root = tmp_path / "mnist"
    root.mkdir()
    for split, num_images in (("train", 30), ("test", 20)):
        images = np.full((num_images, 28, 28), np.arange(num_images)[:, None, None], dtype=np.uint8)
        np.savez(root / f"{split}.npz", images=images, labels=np.arange(num_images) % 10)
    return root


def test_size_and_channels_come_from_the_source_and_splits_are_other_data_sets(
    mnist: Path, tmp_path: Path, refusal: Refusal
) -> None:
    assert run(f"mnist:{mnist}", "--out", tmp_path / "set", "--split", "test") == 0
    index = load_index(tmp_path / "set")
    assert (index.num_samples, index.image_size, index.image_channels, index.num_classes) == (20, 28, 1, 10)
    assert index.options["split"] == "test"
    assert "split is test there, train here" in refusal(f"mnist:{mnist}", "--out", tmp_path / "set", "--split", "train")
    assert "folder has no splits" in refusal(tmp_path, "--out", tmp_path / "x", "--size", 8, "--split", "test")


def test_seed_decides_on_the_triplets_of_stackedmnist(mnist: Path, tmp_path: Path, refusal: Refusal) -> None:
    command = (f"stackedmnist:{mnist}", "--max-images", 50, "--size", 32)
    assert run(*command, "--out", tmp_path / "one", "--seed", 3) == 0
    assert run(*command, "--out", tmp_path / "two", "--seed", 3) == 0
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    index = load_index(tmp_path / "one")
    assert (index.num_samples, index.image_channels, index.num_classes) == (50, 3, 1000)
    assert (index.options["seed"], index.options["max_images"]) == (3, 50)
    assert "seed is 3 there, 4 here" in refusal(*command, "--out", tmp_path / "one", "--seed", 4)


def test_damaged_result_in_the_way_is_named(class_folder: Path, tmp_path: Path, refusal: Refusal) -> None:
    command = (class_folder, "--out", tmp_path / "set", "--size", 8)
    assert run(*command) == 0
    (tmp_path / "set" / "00000.tar").unlink()
    assert "holds a damaged data set: shard 00000.tar: cannot read" in refusal(*command)


@pytest.mark.parametrize("kind", ["", "zip:", "webdataset:", "mnist:"])
def test_pipe_is_refused_rather_than_waited_for(tmp_path: Path, refusal: Refusal, kind: str) -> None:
    os.mkfifo(tmp_path / "pipe.zip")
    told = refusal(f"{kind}{tmp_path}/pipe.zip", "--out", tmp_path / "set", "--size", 8)
    assert "is neither a file nor a folder" in told


def test_too_little_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal) -> None:
    def open_large_source(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(data.prepare.command, "open_source", open_large_source)
    told = "data.prepare: too little memory; run again with fewer --workers or a smaller --size\n"
    assert refusal("digits", "--out", tmp_path / "set", code=1) == told


@pytest.mark.parametrize(("before", "code"), [(signal.SIG_DFL, 130), (signal.SIG_IGN, 0)], ids=["terminal", "nohup"])
def test_closed_terminal_interrupts_unless_that_is_ignored(
    class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: signal.Handlers, code: int
) -> None:
    def open_source_and_hang_up(*arguments: Any, **options: Any) -> Source:
        os.kill(os.getpid(), signal.SIGHUP)
        return open_source(*arguments, **options)

    monkeypatch.setattr(data.prepare.command, "open_source", open_source_and_hang_up)
    previous = signal.signal(signal.SIGHUP, before)
    try:
        assert run(class_folder, "--out", tmp_path / "set", "--size", 8) == code
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_names_that_the_output_cannot_show_are_escaped(class_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "data.prepare", class_folder, "--out", tmp_path / "sét", "--size", "8"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"{tmp_path}/s\\xe9t: 40 images".encode() in done.stdout


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
    assert "at least 2 of 20 images are unusable, --max-bad 5 allows 1; mend or remove them, or allow more; " in told
    assert "; --upscale enlarges those that are too small:\n" in told
    assert "text.png is no image of a known format" in told
    assert "tiny.png is too small: 5x5, the short side must be at least 8" in told
    assert [file.name for file in tmp_path.iterdir()] == ["flawed"]
    (flawed / "tiny.png").write_text("text")
    assert "or allow more:\n" in refusal(flawed, "--out", tmp_path / "set", "--size", 8, "--max-bad", "5", code=1)


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
    path_open = Path.open

    def open_full(self: Path, mode: str = "r", **options: Any) -> IO[Any]:
        return path_open(Path("/dev/full"), "wb") if mode == "xb" else path_open(self, mode, **options)

    monkeypatch.setattr(Path, "open", open_full)
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

    monkeypatch.setattr(data.prepare.places, "write_index", write_index_late)
    assert "Directory not empty" in refusal(class_folder, "--out", out, "--size", 8, code=1)
    assert [file.name for file in tmp_path.rglob("*")] == ["set", "other.txt"]


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


def test_left_out_files_are_counted_by_suffix_and_reason(
    class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(class_folder, tmp_path / "pictures")
    for name in ("a.txt", "b.txt", "c\x1b[2J.heic"):
        (tmp_path / "pictures" / "cat" / name).write_bytes(b"x")
    assert run(tmp_path / "pictures", "--out", tmp_path / "set", "--size", 8, "--workers", 0) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "files of folder:pictures that were left out:",
        "  2 .txt (no images), such as cat/a.txt",
        r"  1 .heic (HEIC, which is not read: convert them to PNG or JPEG), such as cat/c\x1b[2J.heic",
        "2 classes: cat 20, dog 20",
    ]


def test_kept_colours_are_another_data_set(class_folder: Path, tmp_path: Path, refusal: Refusal) -> None:
    assert run(class_folder, "--out", tmp_path / "set", "--size", 8, "--workers", 0) == 0
    # Not recorded: data sets have the same bytes as before there was a choice.
    assert "colour" not in load_index(tmp_path / "set").options
    error = refusal(class_folder, "--out", tmp_path / "set", "--size", 8, "--colour", "keep")
    assert "holds another prepared data set (colour is None there, keep here)" in error


def test_other_images_of_the_same_names_and_sizes_are_another_data_set(tmp_path: Path, refusal: Refusal) -> None:
    for place, grey in (("one", 10), ("two", 200), ("copy", 10)):
        (tmp_path / place / "set").mkdir(parents=True)
        Image.new("L", (16, 16), grey).save(tmp_path / place / "set" / "0.bmp")
    out = ("--out", tmp_path / "out", "--size", 8, "--workers", 0)
    assert run(tmp_path / "one" / "set", *out) == 0
    assert "holds a data set of other images" in refusal(tmp_path / "two" / "set", *out)
    assert run(tmp_path / "copy" / "set", *out) == 0
