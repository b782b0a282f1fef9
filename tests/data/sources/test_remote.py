"""Sources at a URL: image files are read in place, the rest is copied first; the bytes are those of local files."""

import io
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3fs import S3FileSystem

from data.fetch.downloads import downloads_folder
from data.prepare.command import main
from data.prepare.encode import PreparedForm, prepare_items
from data.sources.find import open_source
from data.sources.remote import RemoteSource
from data.sources.source import SourceError, fingerprint
from data.storage import remote as storage
from data.storage import remote_folder
from data.storage.location import DataError
from data.storage.remote_folder import RemoteFolder
from tests.data.buckets import bucket
from tests.data.servers import Fault, FaultyServer, serve
from tests.data.tables import picture, write_hub_folder
from tests.launch import ROOT


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def s3(module_patch: pytest.MonkeyPatch) -> Iterator[S3FileSystem]:
    """A bucket `sources`."""
    with bucket("sources", module_patch) as filesystem:
        yield filesystem


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a client that hardly pauses between attempts."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return downloads_folder()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    """A web server of an empty folder."""
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as state:
        yield state


def write_classes(root: Path, num_images: int = 12) -> Path:
    for number in range(num_images):
        file = root / ("cat", "dog")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
    (root / "readme.txt").write_text("pictures")
    (root / ".hidden.png").write_bytes(b"")
    return root


def upload(s3: S3FileSystem, folder: Path, name: str) -> str:
    s3.put(f"{folder}/", f"sources/{name}/", recursive=True)
    return f"s3://sources/{name}"


def prepared(source: str, out: Path, *options: str) -> list[bytes]:
    assert main([source, "--out", str(out), "--size", "16", "--shard-samples", "5", *options]) == 0
    return [file.read_bytes() for file in sorted(out.glob("*.tar"))]


@pytest.mark.slow
def test_bucket_of_images_is_read_in_place_and_gives_the_bytes_of_the_folder(
    s3: S3FileSystem, tmp_path: Path, cache: Path
) -> None:
    folder = write_classes(tmp_path / "pictures")
    url = upload(s3, folder, "pictures")
    local, remote = open_source(str(folder)), open_source(url)
    assert isinstance(remote, RemoteSource)
    assert not remote.only_here
    assert (remote.items, remote.class_names, remote.description) == (local.items, local.class_names, local.description)
    assert fingerprint(remote) == fingerprint(local)
    assert [line.text for line in remote.skipped] == [line.text for line in local.skipped]
    assert prepared(url, tmp_path / "a") == prepared(str(folder), tmp_path / "b")
    assert open_source(f"folder:{url}/").items == local.items
    assert not cache.exists()
    copy, form = pickle.loads(pickle.dumps(remote)), PreparedForm(size=16, channels=3, upscale=False)
    assert prepare_items(copy, list(remote.items), form) == prepare_items(local, list(local.items), form)
    # A file that goes is one bad image; one that changes changes the state.
    s3.pipe("sources/pictures/cat/2.png", picture(99))
    assert open_source(url).state != remote.state
    s3.rm("sources/pictures/cat/0.png")
    with pytest.raises(OSError, match="it is gone"):
        remote.read(remote.items[0])


def test_labels_of_dataset_json_in_a_bucket_are_the_classes(s3: S3FileSystem) -> None:
    s3.pipe({f"sources/edm/00000/img{number}.png": picture(number) for number in range(3)})
    s3.pipe(
        "sources/edm/dataset.json", b'{"labels": [["00000/img0.png", 1], ["00000/img1.png", 0], ["00000/img2.png", 1]]}'
    )
    source = open_source("s3://sources/edm")
    assert ([item.label for item in source.items], source.class_names) == ([1, 0, 1], ("0", "1"))
    assert open_source("s3://sources/edm", classes="none").class_names is None


@pytest.mark.slow
def test_shards_tables_and_arrays_in_a_bucket_are_copied_once(s3: S3FileSystem, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "shards" / f"{shard:05d}.tar", "w") as archive:
            for file in sorted(write_classes(tmp_path / "pictures").rglob("[0-9]*.png")):
                archive.add(file, f"{shard}{file.name}")
    url = upload(s3, tmp_path / "shards", "shards")
    assert prepared(url, tmp_path / "a") == prepared(str(tmp_path / "shards"), tmp_path / "b")
    (place,) = (cache / "urls").iterdir()
    kept = {file: file.stat().st_mtime_ns for file in place.rglob("*.tar")}
    assert len(kept) == 2
    s3.rm("sources/shards/00001.tar")
    assert len(open_source(f"webdataset:{url}").items) == 12
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*.tar")}.items() < kept.items()
    url = upload(s3, write_hub_folder(tmp_path / "tables"), "tables")
    assert len(open_source(url, split="test").items) == 6
    assert [file.name for file in cache.rglob("*.parquet")] == ["test-00000-of-00001.parquet"]
    assert prepared(url, tmp_path / "c") == prepared(str(tmp_path / "tables"), tmp_path / "d")
    stream = io.BytesIO()
    np.savez(stream, images=np.zeros((5, 28, 28), np.uint8), labels=np.arange(5))
    s3.pipe("sources/arrays/train.npz", stream.getvalue())
    assert [item.label for item in open_source("mnist:s3://sources/arrays").items] == [0, 1, 2, 3, 4]
    with pytest.raises(SourceError, match="MNIST and Fashion-MNIST have the same files; say which one this is"):
        open_source("s3://sources/arrays")


def test_what_a_bucket_does_not_hold_is_refused(s3: S3FileSystem) -> None:
    s3.pipe("sources/text/a.txt", b"x")
    for url, words in (
        ("s3://sources/none", "source s3://sources/none: there are no files; check the URL"),
        ("s3://sources/text", r"source s3://sources/text: no images in it \(1 other files\)"),
        ("lmdb:s3://sources/text", "source lmdb:s3://sources/text: no files of this kind in it; leave out lmdb:"),
        ("s3://sources/text/no.zip", "no.zip: there is no such file"),
    ):
        with pytest.raises((SourceError, DataError), match=words):
            open_source(url)
    with pytest.raises(DataError, match=r"gs://bucket/x: a package is missing to read it: .*gcsfs"):
        open_source("gs://bucket/x")


def test_archive_on_a_web_server_is_copied_and_continued(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(server.folder / "set.zip", "w") as archive:
        for file in sorted(write_classes(tmp_path / "pictures").rglob("[0-9]*.png")):
            archive.write(file, file.relative_to(tmp_path / "pictures"))
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    server.faults["set.zip"] = [Fault(cut_after=5000), Fault(status=503)]
    url = f"{server.url}/set.zip"
    assert main([url, "--out", str(tmp_path / "a"), "--size", "16"]) == 2
    assert "HTTP 503 Service Unavailable" in (told := capsys.readouterr().err)
    assert "What has arrived stays: give the same command again" in told
    copied = prepared(url, tmp_path / "a", "--shard-samples", "5")
    assert server.ranges == [None, "bytes=5000-", "bytes=5000-"]
    assert copied == prepared(str(server.folder / "set.zip"), tmp_path / "b")
    source = open_source(f"zip:{url}")
    assert (len(source.items), source.only_here) == (12, True)
    assert not open_source(str(server.folder / "set.zip")).only_here
    assert server.gets["set.zip"] == 3


def test_archive_in_a_bucket_is_continued(s3: S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted(write_classes(tmp_path / "pictures").rglob("[0-9]*.png")):
            archive.write(file, file.relative_to(tmp_path / "pictures"))
    content, starts, call = (tmp_path / "set.zip").read_bytes(), list[int](), RemoteFolder._call

    def failing(self: RemoteFolder, method: str, name: str, *arguments: Any, **named: Any) -> Any:
        if method == "cat_file":
            starts.append(named["start"])
            if len(starts) == 3:
                raise ConnectionRefusedError
        return call(self, method, name, *arguments, **named)

    s3.pipe("sources/continued/set.zip", content)
    monkeypatch.setattr(remote_folder, "_RANGE_BYTES", 2000)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    monkeypatch.setattr(RemoteFolder, "_call", failing)
    with pytest.raises(DataError, match=r"the connection was refused.*What has arrived stays: give the same command"):
        open_source("s3://sources/continued/set.zip")
    assert len(open_source("s3://sources/continued/set.zip").items) == 12
    assert starts == [0, 2000, 4000, *range(4000, len(content), 2000)]


def test_folder_on_a_web_server_is_refused_with_what_to_do(server: FaultyServer) -> None:
    with pytest.raises(SourceError, match=r"does not say which files a folder has; give .* archive .*wget -r"):
        open_source(server.url)


def test_file_url_is_a_local_path(tmp_path: Path) -> None:
    write_classes(tmp_path / "pictures")
    assert len(open_source(f"file://{tmp_path}/pictures").items) == 12


@pytest.mark.slow
def test_storage_that_goes_away_keeps_the_finished_shards_and_the_same_command_continues(
    s3: S3FileSystem, tmp_path: Path
) -> None:
    folder = write_classes(tmp_path / "pictures", 50)
    url = upload(s3, folder, "going")
    code = (
        "import sys, data.storage.remote as r, data.prepare.command as c\n"
        "r.FIRST_WAIT_S, content, read = 0.01, r.Storage._call, []\n"
        "def call(self, method, *args, **kwargs):\n"
        "    read.append(method)\n"
        "    if read.count('cat_file') > 40: raise ConnectionRefusedError('gone')\n"
        "    return content(self, method, *args, **kwargs)\n"
        "r.Storage._call = call\n"
        "sys.exit(c.main(sys.argv[1:]))"
    )
    arguments = [url, "--out", str(tmp_path / "out"), "--size", "16", "--shard-samples", "4", "--workers", "0"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "the connection was refused" in done.stderr
    assert "8 finished shards are kept" in done.stderr  # the first 32 images
    again = [sys.executable, "-m", "data.prepare", *arguments[:-1], "2"]  # its workers have the credentials from it
    assert subprocess.run(again, cwd=ROOT).returncode == 0
    assert main([str(folder), "--out", str(tmp_path / "local"), *arguments[3:]]) == 0
    shards = sorted((tmp_path / "local").glob("*.tar"))
    assert len(shards) == 13
    assert all((tmp_path / "out" / shard.name).read_bytes() == shard.read_bytes() for shard in shards)
