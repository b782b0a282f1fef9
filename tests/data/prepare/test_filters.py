"""Filters take away what they name, in every number of processes and after restarts."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.prepare.command import main
from data.shards.files import LocalShards
from data.shards.index import Shard, load_index
from data.shards.reader import samples_in_order
from data.shards.writer import ShardSequence

Refusal = Callable[..., str]


@pytest.fixture(scope="module")
def folder(made_photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight different photographs; one is there twice, one is encoded again, one is small, one long, one damaged."""
    root = tmp_path_factory.mktemp("filtered")
    for number in range(8):
        shutil.copy(made_photographs / f"{number:03d}.jpg", root / f"{number}.jpg")
    shutil.copy(root / "2.jpg", root / "twin.jpg")
    Image.open(root / "3.jpg").resize((150, 140)).save(root / "reduced.jpg", quality=70)
    noise = np.random.default_rng(0).integers(0, 256, (40, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "long.png")
    Image.fromarray(noise[:, :30]).save(root / "small.png")
    (root / "broken.jpg").write_bytes((root / "5.jpg").read_bytes()[:3000])
    return root


def names(out: Path) -> list[str]:
    """The names of the source's files in a data set."""
    index = load_index(out)
    return sorted(sample.key[10:] for sample in samples_in_order(index.shards, LocalShards(index).open))


def prepare(source: Path, out: Path, *options: object) -> int:
    arguments = [source, "--out", out, "--size", 32, "--upscale", "--max-bad", 20, "--workers", 0, *options]
    return main([str(argument) for argument in arguments])


EIGHT = [str(number) for number in range(8)]


@pytest.mark.parametrize(
    ("options", "kept", "told"),
    [
        (["--min-side", 40], [*EIGHT, "long", "reduced", "twin"], ["--min-side 40: 1"]),
        (["--max-aspect", 1.5], [*EIGHT, "reduced", "twin", "small"], ["--max-aspect 1.5: 1"]),
        (["--dedup", "exact"], [*EIGHT, "long", "reduced", "small"], ["--dedup exact: 1"]),
        (["--dedup", "perceptual"], [*EIGHT, "long", "small"], ["--dedup exact: 1", "--dedup perceptual: 1"]),
        (
            ["--dedup", "perceptual", "--max-aspect", 1.5, "--min-side", 100],
            EIGHT,
            ["--min-side 100: 2", "--max-aspect 1.5: 0", "--dedup exact: 1", "--dedup perceptual: 1"],
        ),
    ],
)
def test_filters_take_away_what_they_name_and_say_how_many(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[object],
    kept: list[str],
    told: list[str],
) -> None:
    assert prepare(folder, tmp_path / "set", *options) == 0
    assert names(tmp_path / "set") == sorted(kept)
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("images that were filtered out:")
    assert lines[at + 1 : at + 1 + len(told)] == [f"  {line}" for line in told]
    # A filter leaves the damaged one to --max-bad.
    assert any(line.startswith("1 unusable images") for line in lines)


@pytest.mark.slow
def test_filtered_set_is_the_same_from_any_number_of_processes(folder: Path, tmp_path: Path) -> None:
    options = ("--dedup", "perceptual", "--shard-samples", 3)
    for workers in (0, 2):
        assert prepare(folder, tmp_path / str(workers), *options, "--workers", workers) == 0
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("0", "2"))
    assert one == two


def test_filtered_preparation_continues_after_a_stop(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--dedup", "perceptual", "--shard-samples", 3)
    assert prepare(folder, tmp_path / "whole", *options) == 0
    write, written = ShardSequence.write, list[str]()

    def stop_at_the_fifth(self: ShardSequence, key: str, members: dict[str, bytes]) -> Shard | None:
        written.append(key)
        if len(written) == 5:
            raise KeyboardInterrupt
        return write(self, key, members)

    with monkeypatch.context() as patch:
        patch.setattr(ShardSequence, "write", stop_at_the_fifth)
        assert prepare(folder, tmp_path / "stopped", *options) == 130
    capsys.readouterr()
    assert prepare(folder, tmp_path / "stopped", *options) == 0
    assert "continuing after 1 finished shards" in capsys.readouterr().err
    whole, stopped = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "stopped")
    )
    assert whole == stopped


def test_index_tells_the_filters_and_other_filters_are_another_set(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    assert prepare(folder, tmp_path / "set", "--min-side", 40, "--dedup", "exact") == 0
    index = load_index(tmp_path / "set")
    assert (index.options["min_side"], index.options["dedup"]) == (40, "exact")
    assert "where" not in index.options
    capsys.readouterr()
    assert prepare(folder, tmp_path / "set", "--min-side", 40, "--dedup", "exact") == 0
    assert "nothing to do" in capsys.readouterr().out
    # The files have new times: their content is compared, of those that the filters leave.
    shutil.copytree(folder, tmp_path / folder.name, copy_function=shutil.copyfile)
    assert prepare(tmp_path / folder.name, tmp_path / "set", "--min-side", 40, "--dedup", "exact") == 0
    told = refusal(folder, "--out", tmp_path / "set", "--size", 32, "--upscale", "--min-side", 41, "--dedup", "exact")
    assert "min_side is 40 there, 41 here" in told


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    """Two shards as img2dataset writes them: 0-3 with a value, 4 and 5 without, 6 and 7 without a .json."""
    root = tmp_path / "downloaded"
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as archive:
            for number in range(4 * shard, 4 * shard + 4):
                row = {"punsafe": number / 10, "url": f"http://host/{number}"} if number < 4 else {"punsafe": None}
                members = {"jpg": (folder / f"{number}.jpg").read_bytes(), "txt": b"a caption"}
                if number < 6:
                    members["json"] = json.dumps(row).encode()
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return root


def test_columns_of_webdataset_shards_decide(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(shards, tmp_path / "set", "--where", "punsafe<0.2", "--classes", "none") == 0
    assert sorted(name[-1] for name in names(tmp_path / "set")) == ["0", "1"]
    assert "  --where 'punsafe<0.2': 6, 4 of them without a value" in capsys.readouterr().out
    assert load_index(tmp_path / "set").options["where"] == "punsafe<0.2"


def test_wrong_filters_are_told_in_one_line(shards: Path, folder: Path, tmp_path: Path, refusal: Refusal) -> None:
    common = ("--out", tmp_path / "set", "--size", 32)
    assert "there is no column unsafe; there are: punsafe, url" in refusal(shards, *common, "--where", "unsafe<1")
    assert "has no columns for --where" in refusal(folder, *common, "--where", "a<1")
    assert "'f(a)' is not allowed; allowed are comparisons" in refusal(shards, *common, "--where", "f(a)")
    assert "--max-aspect: '0.5' is given, allowed is a number of 1 or more" in refusal(
        folder, *common, "--max-aspect", 0.5
    )
    told = refusal(shards, *common, "--where", "punsafe > 5")
    assert "no image is left of 8: --where 'punsafe > 5': 8, 4 of them without a value" in told
    assert sorted(file.name for file in tmp_path.iterdir()) == ["downloaded"]
