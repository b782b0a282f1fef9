"""`verify` finds every fault that a data set can have, names all of them, and passes a good one."""

import hashlib
import http.server
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.prepare.command import main
from data.shards.index import Shard, ShardIndex, load_index, offsets_name
from data.shards.writer import ShardSequence
from tests.launch import ROOT

Verify = Callable[..., list[str]]
Members = list[tuple[str, dict[str, bytes]]]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    """Runs the command, expects an exit code, and returns the lines of its output."""

    def run(index: ShardIndex, *options: str, code: int) -> list[str]:
        capsys.readouterr()
        assert main(["verify", str(index.directory), *options]) == code
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out.splitlines()

    return run


def edit_index(index: ShardIndex, change: Callable[[dict[str, Any]], object]) -> None:
    file = index.directory / "index.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rewrite_shard(index: ShardIndex, number: int, change: Callable[[Members], object]) -> Members:
    """Change samples of a shard and make the index agree with the file; gives the samples as they are then."""
    name = index.shards[number].name
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(index.directory / name) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = archive.extractfile(member).read()  # pyright: ignore
    changed = list(samples.items())
    change(changed)
    files = [file.name for file in index.shards[number].files]
    for file in files:
        (index.directory / file).unlink()
    other = index.directory / "other"
    other.mkdir()
    with ShardSequence(other, shard_samples=None, shard_bytes=None) as shards:
        for key, members in changed:
            shards.write(key, members)
        shards.finish()
    (written,) = shards.shards
    for file, old in zip(files, written.files, strict=True):
        (other / old.name).rename(index.directory / file)
    other.rmdir()
    edit_index(index, lambda document: document["shards"].__setitem__(number, renamed(written, name)))
    return changed


def renamed(shard: Shard, name: str) -> dict[str, Any]:
    """What index.json says of a shard that has got another name."""
    assert shard.offsets is not None
    return asdict(replace(shard, name=name, offsets=replace(shard.offsets, name=offsets_name(name))))


def file_of(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_good_data_set_passes(prepared: ShardIndex, verify: Verify, workers: str) -> None:
    assert verify(prepared, "--workers", workers, code=0) == [
        f"{prepared.directory}: 40 images in 8 shards: all is well"
    ]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_flipped_byte_and_missing_shard_are_named(own_copy: ShardIndex, verify: Verify, workers: str) -> None:
    file = own_copy.directory / "00001.tar"
    content = bytearray(file.read_bytes())
    # In the padding behind a label, where nothing else would notice.
    content[1000] ^= 1
    file.write_bytes(content)
    (own_copy.directory / "00006.tar").unlink()
    stated = own_copy.shards[1].sha256
    lines = verify(own_copy, "--workers", workers, code=1)
    assert lines[0] == (
        f"shard 00001.tar: its SHA-256 is {hashlib.sha256(content).hexdigest()}, the index says {stated}"
    )
    assert lines[1].startswith(f"shard 00006.tar: cannot open {own_copy.directory}/00006.tar: No such file")
    assert lines[2:] == [
        f"{own_copy.directory}: 40 images in 8 shards: bad shards: 2, bad images: 0; "
        "prepare the data set again or copy it again"
    ]


def test_truncated_shard_and_damaged_header_are_named(own_copy: ShardIndex, verify: Verify) -> None:
    os.truncate(own_copy.directory / "00002.tar", 1500)
    content = bytearray((own_copy.directory / "00003.tar").read_bytes())
    content[260] ^= 0x55
    (own_copy.directory / "00003.tar").write_bytes(content)
    lines = verify(own_copy, code=1)
    assert [line[:15] for line in lines[:-1]] == ["shard 00002.tar", "shard 00002.tar", *["shard 00003.tar"] * 2]
    assert "damaged" in lines[1]
    assert "bad shards: 2, bad images: 0" in lines[-1]


def test_bad_images_in_a_shard_whose_hash_is_right_are_named(own_copy: ShardIndex, verify: Verify) -> None:
    def change(samples: Members) -> None:
        samples[0][1]["png"] = b"text"
        samples[1][1]["png"] = samples[1][1]["png"][:40]
        samples[2][1]["png"] = file_of(Image.new("RGB", (9, 8)))
        samples[3][1]["png"] = file_of(Image.new("L", (8, 8)))

    keys = [key for key, _ in rewrite_shard(own_copy, 4, change)]
    lines = verify(own_copy, code=1)
    for key, line, reason in zip(
        keys, lines, ["the image is damaged", "the image is damaged", "9x8 with 3 channels", "8x8 with 1"], strict=False
    ):
        assert line.startswith(f"shard 00004.tar, key {key}: ")
        assert reason in line
    assert lines[4:] == [
        f"{own_copy.directory}: 40 images in 8 shards: bad shards: 0, bad images: 4; "
        "prepare the data set again or copy it again"
    ]


def test_labels_out_of_range_and_missing_ones_are_named(own_copy: ShardIndex, verify: Verify) -> None:
    def change(samples: Members) -> None:
        samples[1][1]["cls"] = b"2"
        del samples[3][1]["cls"]

    keys = [key for key, _ in rewrite_shard(own_copy, 0, change)]
    assert verify(own_copy, code=1)[:-1] == [
        f"shard 00000.tar, key {keys[1]}: its label is 2, the index allows 0 to 1",
        f"shard 00000.tar, key {keys[3]}: it has no label, the index has 2 classes",
    ]
    edit_index(own_copy, lambda content: content.update(num_classes=None, class_names=None))
    lines = verify(own_copy, code=1)
    assert f"shard 00000.tar, key {keys[1]}: it has the label 2, the index has no classes" in lines
    assert "bad images: 39" in lines[-1]


def test_label_that_is_no_number_is_named(own_copy: ShardIndex, verify: Verify) -> None:
    keys = [key for key, _ in rewrite_shard(own_copy, 0, lambda samples: samples[2][1].update(cls=b"cat"))]
    assert f"shard 00000.tar, key {keys[2]}: label b'cat' is no number" in verify(own_copy, code=1)[0]


def test_wrong_number_of_samples_is_named(version_1: ShardIndex, verify: Verify) -> None:
    edit_index(version_1, lambda content: content["shards"][5].update(num_samples=6))
    assert verify(version_1, code=1)[0].startswith("shard 00005.tar has 5 samples, the index says 6")


def test_data_set_of_version_1_passes(version_1: ShardIndex, verify: Verify) -> None:
    assert verify(version_1, code=0) == [f"{version_1.directory}: 40 images in 8 shards: all is well"]


def test_damaged_and_missing_offsets_are_named(own_copy: ShardIndex, verify: Verify) -> None:
    file = own_copy.directory / "00001.offsets"
    content = bytearray(file.read_bytes())
    content[20] ^= 1
    file.write_bytes(content)
    (own_copy.directory / "00004.offsets").unlink()
    lines = verify(own_copy, code=1)
    found = hashlib.sha256(content).hexdigest()
    assert lines[0].startswith(f"offsets 00001.offsets of shard 00001.tar: the file is damaged: its SHA-256 is {found}")
    told = f"offsets 00004.offsets of shard 00004.tar: cannot open {own_copy.directory}/00004.offsets: No such file"
    assert lines[1].startswith(told)
    assert "bad shards: 2, bad images: 0" in lines[2]


def test_offsets_of_a_right_hash_that_do_not_fit_the_shard_are_named(own_copy: ShardIndex, verify: Verify) -> None:
    file = own_copy.directory / "00002.offsets"
    rows = np.fromfile(file, "<u4").reshape(-1, 3)
    rows[[3, 4]] = rows[[4, 3]]
    file.write_bytes(rows.tobytes())
    right = hashlib.sha256(rows.tobytes()).hexdigest()
    edit_index(own_copy, lambda content: content["shards"][2]["offsets"].update(sha256=right))
    assert verify(load_index(own_copy.directory), code=1) == [
        "offsets 00002.offsets of shard 00002.tar: the shard has sample 3 in another place, or with another size or "
        "label",
        f"{own_copy.directory}: 40 images in 8 shards: bad shards: 1, bad images: 0; "
        "prepare the data set again or copy it again",
    ]


def test_repeated_keys_are_named_within_and_across_shards(own_copy: ShardIndex, verify: Verify) -> None:
    first = rewrite_shard(own_copy, 1, lambda samples: None)

    def change(samples: Members) -> None:
        samples[0] = (first[2][0], samples[0][1])
        samples[4] = (samples[3][0] + "x", samples[4][1])

    rewrite_shard(own_copy, 6, change)
    key = first[2][0]
    lines = verify(own_copy, code=1)
    assert lines[:-1] == [f"shard 00006.tar, key {key}: the key is not unique, shard 00001.tar has it too"]
    assert "bad shards: 0, bad images: 1" in lines[-1]


def test_mistakes_are_told_in_one_line(tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert f"no prepared data set at {tmp_path}" in refusal("verify", tmp_path)
    assert "--workers: '-1' is given, allowed is a whole number of 0 to 1024" in refusal(
        "verify", tmp_path, "--workers", "-1"
    )
    assert "unrecognized arguments: --sheet" in refusal("verify", tmp_path, "--sheet", "a.png")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url(own_copy: ShardIndex) -> Iterator[str]:
    """The copy at a real server."""
    handler = partial(QuietHandler, directory=str(own_copy.directory.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/copy"
        server.shutdown()
        thread.join()


def run_apart(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """The command with a folder for temporary files, and so a cache, of its own."""
    cache.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "data.prepare", *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(cache)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_data_set_at_a_url_is_inspected_and_verified(
    own_copy: ShardIndex, url: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("c")  # short: processes meet at sockets in it, whose paths have 107 characters
    shown = run_apart("inspect", url, "--sheet", str(tmp_path / "there.png"), cache=cache)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"location      {url}\n")
    assert main(["inspect", str(own_copy.directory), "--sheet", str(tmp_path / "here.png")]) == 0
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    done = run_apart("verify", url, "--workers", "2", cache=cache)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{url}: 40 images in 8 shards: all is well\n", "")


def test_altered_shard_at_a_url_is_named(own_copy: ShardIndex, url: str, tmp_path: Path) -> None:
    damaged = bytearray((own_copy.directory / "00002.tar").read_bytes())
    damaged[1000] ^= 1
    (own_copy.directory / "00002.tar").write_bytes(damaged)
    done = run_apart("verify", url, "--workers", "0", cache=tmp_path / "cache")
    assert done.returncode == 1
    assert done.stdout.count("\n") == 2
    assert "00002.tar" in done.stdout
    assert "bad shards: 1, bad images: 0" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_interrupt_is_one_line(tmp_path: Path, workers: str) -> None:
    (tmp_path / "source").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "source" / "0.image", "PNG")
    for number in range(16):
        (tmp_path / "source" / f"{number}.png").symlink_to("0.image")
    out = tmp_path / "set"
    assert main([str(tmp_path / "source"), "--out", str(out), "--size", "256", "--workers", "0"]) == 0
    # The same shard 500 times is enough work to be stopped in. The first one is wrong, so that there is a first line.
    (shard,) = load_index(out).shards
    shards = [renamed(shard, f"{number:05d}.tar") for number in range(500)]
    for other in shards[1:]:
        (out / other["name"]).hardlink_to(out / "00000.tar")
        (out / other["offsets"]["name"]).hardlink_to(out / "00000.offsets")
    shards[0]["sha256"] = "0" * 64
    edit_index(load_index(out), lambda content: content.update(shards=shards))
    process = subprocess.Popen(
        [sys.executable, "-m", "data.prepare", "verify", str(out), "--workers", workers],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("shard 00000.tar: its SHA-256 is ")
    os.killpg(process.pid, signal.SIGINT)
    rest, told = process.communicate(timeout=30)
    assert (process.returncode, rest, told) == (130, "", "data.prepare: interrupted; run the same command again\n")
