"""Known data sets are fetched once, verified, continued after a stop, and asked for where there is no network."""

import gzip
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data.fetch import known
from data.fetch.known import KNOWN, KnownFile, KnownSet, fetch_known
from data.prepare.command import main
from data.sources.find import open_source
from data.storage import remote as storage
from data.storage.errors import UserError
from tests.data.servers import Fault, FaultyServer, serve

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


def published(folder: Path) -> tuple[KnownFile, ...]:
    """Twenty digits in MNIST's form, for both parts."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    arrays = {"images-idx3": (2051, pixels), "labels-idx1": (2049, np.arange(20, dtype=np.uint8) % 10)}
    files = []
    for part in ("train", "t10k"):
        for kind, (magic, array) in arrays.items():
            file = folder / f"{part}-{kind}-ubyte.gz"
            header = np.array([magic, *array.shape], dtype=">u4").tobytes()
            file.write_bytes(gzip.compress(header + array.tobytes(), mtime=0))
            content = file.read_bytes()
            files.append(KnownFile(file.name, len(content), hashlib.sha256(content).hexdigest()))
    return tuple(files)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """A small MNIST, published on loopback, and an empty cache."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "published").mkdir()
    files = published(tmp_path / "published")
    with serve(tmp_path / "published") as state:
        monkeypatch.setitem(KNOWN, "mnist", KnownSet(state.url, files))
        yield state


def test_published_hashes_and_sizes_are_well_formed() -> None:
    files = [file for known_set in KNOWN.values() for file in known_set.files]
    assert {name: len(known_set.files) for name, known_set in KNOWN.items()} == {
        "cifar10": 1,
        "mnist": 4,
        "fashionmnist": 4,
    }
    assert all(len(bytes.fromhex(file.sha256)) == 32 for file in files)
    assert len({file.sha256 for file in files}) == 9


def test_name_alone_prepares_what_the_folder_of_its_files_prepares(
    server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mnist", "--out", str(tmp_path / "a"), "--workers", "0"]) == 0
    told = capsys.readouterr()
    assert "20 images 28x28x1" in told.out
    assert f"fetching {IMAGES} (0.0 MB)" in told.err
    assert main([f"mnist:{server.folder}", "--out", str(tmp_path / "b"), "--workers", "0"]) == 0
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()
    asked = server.gets.copy()
    assert len(open_source("mnist", split="test").items) == 20
    assert len(open_source("stackedmnist", max_images=7).items) == 7
    assert server.gets == asked


def test_stopped_download_continues_where_it_stopped(server: FaultyServer) -> None:
    server.faults[IMAGES] = [Fault(cut_after=3000), Fault(cut_after=2000), Fault(hangs_up=True)]
    with pytest.raises(UserError, match=r"2 attempts"):
        fetch_known("mnist")
    assert server.ranges == [None, "bytes=3000-"]
    folder = fetch_known("mnist")
    # The third request got no answer; the fourth asks for what follows the 3000 and 2000 bytes.
    assert server.ranges[2] == "bytes=5000-"
    assert server.gets[IMAGES] == 4
    assert (folder / IMAGES).read_bytes() == (server.folder / IMAGES).read_bytes()
    assert sorted(file.name for file in folder.iterdir() if not file.name.startswith(".")) == sorted(
        file.name for file in KNOWN["mnist"].files
    )


def test_server_that_cannot_continue_sends_the_whole_file(server: FaultyServer) -> None:
    server.ignores_ranges = True
    server.faults[IMAGES] = [Fault(cut_after=3000)]
    with pytest.raises(UserError, match="cannot continue in the middle"):
        fetch_known("mnist")
    folder = fetch_known("mnist")
    assert (folder / IMAGES).read_bytes() == (server.folder / IMAGES).read_bytes()


def test_another_file_is_refused_wherever_it_comes_from(server: FaultyServer) -> None:
    server.faults[LABELS] = [Fault(content=bytes((server.folder / LABELS).stat().st_size))]
    with pytest.raises(UserError, match="which is not that of the published file"):
        fetch_known("mnist")
    folder = fetch_known("mnist")
    (folder / LABELS).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{LABELS} is damaged or another file: it has 1 bytes, .*; remove it"):
        fetch_known("mnist")


def test_without_a_network_the_message_says_what_belongs_where_and_that_is_enough(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = KNOWN["mnist"].files
    monkeypatch.setitem(KNOWN, "mnist", KnownSet("http://127.0.0.1:1/mnist", files))
    assert main(["mnist", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    folder = tmp_path / "cache" / "ddgan" / "sources" / "mnist"
    assert f"Without a network, get elsewhere and put into {folder}: http://127.0.0.1:1/mnist/{IMAGES} (" in told
    assert all(file.sha256 in told and file.name in told for file in files)
    assert told.count("\n") == told.count("fetching") + 1
    for file in files:
        shutil.copy(server.folder / file.name, folder)
    assert main(["mnist", "--out", str(tmp_path / "out"), "--workers", "0"]) == 0


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cifar10: cannot be kept in .*; free some space, or set XDG_CACHE_HOME"):
        known.fetch_known("cifar10")
