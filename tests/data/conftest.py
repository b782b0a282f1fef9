"""Tiny sources and prepared data sets in temporary folders."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.prepare.command import main
from data.shards.files import LocalShards
from data.shards.index import Shard, ShardIndex, load_index
from data.shards.reader import ShardReader
from data.storage import remote as storage
from tests.data.servers import FaultyServer, serve
from tests.data.versions import write_version_1

PHOTOS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "photos"


def open_shard(index: ShardIndex, shard: Shard) -> ShardReader:
    """A reader of a local shard."""
    return ShardReader(LocalShards(index).open, shard)


@pytest.fixture
def photos() -> Path:
    """The folder of real photographs; skips where it is absent."""
    if not PHOTOS.is_dir():
        pytest.skip(f"no real photographs at {PHOTOS}")
    return PHOTOS


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures of different sizes in two class folders; the colour tells the class and the number."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(40):
        label = number % 2
        file = root / ("cat", "dog")[label] / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True)
        pixels = np.empty((20 + number % 3, 24, 3), dtype=np.uint8)
        pixels[...] = (label * 200, number * 6, 30)
        Image.fromarray(pixels).save(file)
    return root


@pytest.fixture(scope="session")
def made_photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 files of 280 x 300 pixels with as much detail as photographs have: smooth shapes under some noise."""
    root = tmp_path_factory.mktemp("photographs")
    y, x = np.mgrid[0:280, 0:300].astype(np.float32)
    for number in range(320):
        draws = np.random.default_rng(number)
        waves = [np.sin(x * a + y * b + c) for a, b, c in draws.uniform(0, 0.1, (3, 3))]
        pixels = 128 + 90 * np.stack(waves, axis=-1) + draws.normal(0, 6, (280, 300, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{number:03d}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def prepared(class_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """The class folder as eight shards of five 8x8 RGB images."""
    out = tmp_path_factory.mktemp("prepared") / "set"
    code = main([str(class_folder), "--out", str(out), "--size", "8", "--shard-samples", "5", "--workers", "0"])
    assert code == 0
    return load_index(out)


@pytest.fixture
def own_copy(prepared: ShardIndex, tmp_path: Path) -> ShardIndex:
    """A copy of the prepared data set that a test may damage."""
    target = tmp_path / "copy"
    target.mkdir()
    for file in prepared.directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return load_index(target)


@pytest.fixture
def version_1(prepared: ShardIndex, tmp_path: Path) -> ShardIndex:
    """The prepared shards as a data set of version 1, without offsets; a test may damage it."""
    return write_version_1(prepared, tmp_path / "version-1")


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """Runs the command, expects an exit code, and returns its one line on stderr."""

    def run(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        if code == 2:
            assert captured.err.count("\n") == 1
        return captured.err

    yield run


@pytest.fixture
def server(prepared: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """The prepared data set over HTTP; the patience of the client is short."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(prepared.directory) as state:
        yield state


@pytest.fixture
def index(server: FaultyServer) -> ShardIndex:
    """The index of the served data set."""
    return load_index(server.url)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a cache may be made."""
    return tmp_path / "cache"
