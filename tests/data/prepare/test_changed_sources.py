"""A source that changes meanwhile, loses classes, or holds something else than images is not prepared in silence."""

import io
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data.prepare.work
from data.prepare.command import main
from data.shards.files import LocalShards
from data.shards.index import load_index
from data.shards.reader import samples_in_order

Refusal = Callable[..., str]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize("changed", [False, True])
def test_stopped_preparation_does_not_continue_with_changed_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], changed: bool
) -> None:
    def paint(grey: int) -> None:  # the files keep their names and sizes
        for number in range(72):
            Image.new("L", (16, 16), grey).save(tmp_path / "pictures" / f"{number:02d}.bmp")

    def interrupted(*arguments: Any) -> Any:
        yield from itertools.islice(map_in_order(*arguments), 1)
        raise KeyboardInterrupt

    map_in_order = data.prepare.work.map_in_order
    options = (tmp_path / "pictures", "--out", tmp_path / "set", "--size", 8, "--shard-samples", 8, "--workers", 0)
    (tmp_path / "pictures").mkdir()
    paint(10)
    with monkeypatch.context() as patch:
        patch.setattr(data.prepare.work, "map_in_order", interrupted)
        assert run(*options) == 130
    kept = sorted((tmp_path / ".set.unfinished" / "set").glob("*.tar"))
    assert len(kept) >= 3
    if changed:
        paint(200)
    capsys.readouterr()
    assert run(*options) == 0
    index = load_index(tmp_path / "set")
    greys = {
        np.asarray(Image.open(io.BytesIO(sample.content))).max()
        for sample in samples_in_order(index.shards, LocalShards(index).open)
    }
    assert greys == {200 if changed else 10}


def test_classes_that_lose_all_their_images_are_named_and_numbers_do_not_move(
    class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = shutil.copytree(class_folder, tmp_path / "pictures")
    (pictures / "bird").mkdir()
    (pictures / "bird" / "0.png").write_bytes(b"x")
    (pictures / "ant").mkdir()
    assert run(pictures, "--out", tmp_path / "set", "--size", 8, "--workers", 0, "--max-bad", 5) == 0
    *_, empty, last = capsys.readouterr().out.splitlines()
    assert empty == "folders without images, which are not classes: ant"
    assert last == "3 classes: cat 20, dog 20; without images: bird"
    assert load_index(tmp_path / "set").class_names == ("bird", "cat", "dog")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, .*; run git lfs pull"),
        (b"<!DOCTYPE html><title>404", "an HTML page, as a failed download leaves it; download it again"),
        (b"\0\0\0\x1cftypavif", "AVIF, which is not read; convert it"),
        (b"\0\0\0\x18ftypheic", "HEIC, which is not read; convert it"),
    ],
)
def test_file_that_is_something_else_than_an_image_is_named(
    tmp_path: Path, refusal: Refusal, content: bytes, told: str
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.jpg").write_bytes(content)
    assert re.search(told, refusal(tmp_path / "pictures", "--out", tmp_path / "set", "--size", 8, code=1))
