"""What the tasks of a cluster write, to a folder or a URL, when they run one after the other in this process."""

import errno
import pickle
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from s3fs import S3FileSystem

from data.formats.spool import Spool
from data.prepare import on_ray, places
from data.prepare.command import main
from data.prepare.encode import PreparedForm, prepare_items
from data.prepare.on_ray import RayWay, refuse_other_view
from data.sources.files import FolderSource
from data.sources.source import Item
from data.storage.location import DataError
from tests.data.buckets import bucket
from tests.data.tables import picture, write_hub_folder

Refusal = Callable[..., str]


class OneProcess:
    """The calls of Ray that the tasks need; a task runs when it is started, on copies of its arguments."""

    def put(self, value: Any) -> Any:
        return value

    def get(self, value: Any) -> Any:
        return value

    def wait(self, values: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return values, []

    def remote(self, **_: Any) -> Callable[[Callable[..., Any]], Any]:
        def task(function: Callable[..., Any]) -> Any:
            sent = staticmethod(lambda *arguments: function(*pickle.loads(pickle.dumps(arguments))))
            return type("Task", (), {"remote": sent})

        return task


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def connected() -> Iterator[RayWay]:
        yield RayWay(2)

    monkeypatch.setattr(on_ray, "_ray", OneProcess)
    monkeypatch.setattr(on_ray, "connected", connected)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3FileSystem]:
    with bucket("places", monkeypatch) as filesystem:
        yield filesystem


@pytest.fixture(scope="module")
def source(made_photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seventy photographs, five of them damaged."""
    root = tmp_path_factory.mktemp("source")
    for number in range(70):
        shutil.copy(made_photographs / f"{number:03d}.jpg", root)
        if number % 15 == 4:
            (root / f"{number:03d}.jpg").write_bytes(b"\xff\xd8\xff")
    return root


def prepare(source: Path, out: object, *options: object) -> int:
    arguments = [source, "--out", out, "--size", 128, "--max-bad", 10, "--workers", 0, *options]
    return main([str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def objects(s3: S3FileSystem, folder: str) -> dict[str, Any]:
    return {name.rpartition("/")[2]: s3.cat_file(name) for name in s3.find(folder)}


@pytest.mark.parametrize(
    ("options", "num_shards"),
    [(("--size", 256, "--shard-mb", 1), 3), (("--shard-samples", 9), 8), (("--shard-samples", 65), 1)],
)
def test_shards_end_where_those_of_one_process_end(
    source: Path, tmp_path: Path, options: tuple[object, ...], num_shards: int
) -> None:
    assert prepare(source, tmp_path / "one", *options) == 0
    assert prepare(source, tmp_path / "ray", *options, "--ray") == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.tar"))) == num_shards


def test_stopped_preparation_at_a_url_continues(
    source: Path,
    s3: S3FileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(places, "_SAVE_EVERY_S", 0)
    assert prepare(source, tmp_path / "one", "--shard-samples", 9) == 0
    written, write = list[str](), on_ray._write

    def stop_at_the_fourth(location: str, name: str, *rest: Any) -> Any:
        if name == "00003.tar":
            raise KeyboardInterrupt
        written.append(name)
        return write(location, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(on_ray, "_write", stop_at_the_fourth)
        assert prepare(source, "s3://places/set", "--shard-samples", 9, "--ray") == 130
    assert "the same command continues at s3://places/set" in capsys.readouterr().err
    assert "index.json" not in objects(s3, "places/set")
    s3.pipe_file("places/set/00002.tar", b"cut off")
    assert prepare(source, "s3://places/set", "--shard-samples", 9, "--ray") == 0
    told = capsys.readouterr().err
    assert "s3://places/set/00002.tar is damaged; shard 00002.tar and those after it are prepared again" in told
    assert "continuing after 2 finished shards" in told
    assert objects(s3, "places/set") == contents(tmp_path / "one")
    assert prepare(source, "s3://places/set", "--shard-samples", 9, "--ray") == 0
    assert "already holds this data set (65 images); nothing to do" in capsys.readouterr().out


def test_what_else_is_at_the_url_stays(source: Path, s3: S3FileSystem, tmp_path: Path, refusal: Refusal) -> None:
    s3.pipe_file("places/notes/a.txt", b"mine")
    common = (source, "--size", 128, "--max-bad", 10, "--ray", "--out")
    assert "holds other files, such as a.txt; choose another" in refusal(*common, "s3://places/notes")
    assert prepare(source, "s3://places/small", "--size", 64, "--ray") == 0
    assert "size is 64 there, 128 here" in refusal(*common, "s3://places/small")
    s3.rm_file("places/small/00000.tar")
    told = refusal(source, "--size", 64, "--max-bad", 10, "--ray", "--out", "s3://places/small")
    assert "holds a damaged data set: shard 00000.tar is missing" in told
    assert "a web server takes no files" in refusal(*common, "https://me:secret@host/x")


def test_what_only_the_driver_can_read_is_sent_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = write_hub_folder(tmp_path / "tables")
    options = ("--size", 16, "--shard-samples", 9, "--dedup", "exact")
    assert prepare(tables, tmp_path / "one", *options) == 0

    def elsewhere(_: object) -> Spool:
        raise FileNotFoundError("of another machine")

    monkeypatch.setattr(Spool, "open", elsewhere)
    assert prepare(tables, tmp_path / "ray", *options, "--ray") == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


@pytest.mark.parametrize("at", ["folder", "url"])
def test_node_whose_disk_is_full_is_named_and_the_same_command_continues(
    source: Path,
    s3: S3FileSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: str,
) -> None:
    monkeypatch.setattr(places, "_SAVE_EVERY_S", 0)
    out = tmp_path / "set" if at == "folder" else "s3://places/full"
    write = on_ray._write_here

    def full(folder: Path, name: str, *rest: Any) -> Any:
        if name == "00003.tar":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(on_ray, "_write_here", full)
        assert prepare(source, out, "--shard-samples", 9, "--ray") == 1
    told = capsys.readouterr().err
    assert (
        f"node {platform.node()} cannot write a shard to {tempfile.gettempdir()}: No space left on device; free" in told
    )
    assert "the same command continues" in told
    assert prepare(source, out, "--shard-samples", 9, "--ray") == 0
    assert "continuing after 3 finished shards" in capsys.readouterr().err


def test_images_that_are_bad_here_too_are_no_fault_of_a_node(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(picture(1)[:90])
    source, form = FolderSource(root=tmp_path, items=()), PreparedForm(size=16, channels=3, upscale=False)
    for name in ("empty.png", "cut.png", "gone.png"):
        (sample,) = prepare_items(source, [Item(name, 0, None)], form)
        assert sample.error
        refuse_other_view(source, sample, "worker")
    (tmp_path / "gone.png").write_bytes(picture(2))
    with pytest.raises(DataError, match=r"node worker cannot read the image gone\.png .*No such file"):
        refuse_other_view(source, sample, "worker")
