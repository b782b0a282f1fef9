"""Files of a bucket appear whole, and one can be changed only by who saw it last."""

from collections.abc import Iterator

import fsspec
import pytest
from s3fs import S3FileSystem

from data.storage import remote as storage
from data.storage.writable import StorageError, WritableStorage
from tests.data.buckets import bucket


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3FileSystem]:
    with bucket("written", monkeypatch) as filesystem:
        yield filesystem


@pytest.mark.slow
def test_what_is_written_is_listed_read_and_removed(s3: S3FileSystem) -> None:
    folder = WritableStorage("s3://written/deep/folder")
    assert folder.files() == {}
    assert folder.read_if_there("a") is None
    large = bytes(range(256)) * 250_000  # more than one part of a multipart upload
    folder.write("one/large", [memoryview(large[:1000]), memoryview(large[1000:])])
    folder.put("one/small", b"{}")
    assert folder.files() == {"one/large": len(large), "one/small": 2}
    assert s3.cat_file("written/deep/folder/one/large") == large
    assert folder.read_if_there("one/small") == b"{}"
    folder.put("one/small", b"[1]")
    assert folder.read_if_there("one/small") == b"[1]"
    folder.remove(["one/small", "never there"])
    assert folder.files() == {"one/large": len(large)}


def test_write_that_breaks_off_leaves_what_was_there(s3: S3FileSystem) -> None:
    folder = WritableStorage("s3://written/folder")
    folder.put("part", b"whole")

    def broken() -> Iterator[memoryview]:
        yield memoryview(bytes(60_000_000))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        folder.write("part", broken())
    assert folder.read_if_there("part") == b"whole"


def test_only_who_saw_the_last_version_writes(s3: S3FileSystem) -> None:
    folder = WritableStorage("s3://written/folder")
    assert folder.has_versions
    assert folder.version("lease") is None
    assert folder.put_if("lease", b"mine", version=None)
    assert not folder.put_if("lease", b"theirs", version=None)
    seen = folder.version("lease")
    assert folder.put_if("lease", b"mine again", version=seen)
    assert not folder.put_if("lease", b"theirs", version=seen)
    assert folder.read_if_there("lease") == b"mine again"
    folder.remove(["lease"])
    assert not folder.put_if("lease", b"theirs", version=seen)


def test_bucket_that_is_not_there_and_server_that_does_not_answer_are_told(
    s3: S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "s3://nowhere/folder: .*there is no such bucket .*; make the bucket, or check the URL"
    for call in calls(WritableStorage("s3://nowhere/folder")):
        with pytest.raises(StorageError, match=told):
            call()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    for call in calls(WritableStorage("s3://written/folder")):
        with pytest.raises(StorageError, match=r"s3://written/folder: .*connect.*; check AWS_ENDPOINT_URL"):
            call()


def calls(folder: WritableStorage):
    yield folder.files
    yield lambda: folder.read_if_there("a")
    yield lambda: folder.put("a", b"1")
    yield lambda: folder.write("a", [memoryview(b"1")])


def test_filesystem_without_a_loop_is_written_too() -> None:
    try:
        folder = WritableStorage("memory://written/folder")
        folder.write("one/part", [memoryview(b"abc")])
        folder.put("manifest", b"{}")
        assert folder.files() == {"one/part": 3, "manifest": 2}
        assert not folder.has_versions
        folder.remove(["manifest"])
        assert folder.read_if_there("manifest") is None
    finally:
        fsspec.filesystem("memory").rm("/written", recursive=True)
