"""Where a place is named in an error, a log or a plan, its secret is not."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from data.shards.files import shard_files
from data.shards.index import ShardIndex, load_index
from data.shards.verification import verify_shards
from data.storage import remote
from data.storage.location import DataError
from data.storage.remote import Storage
from data.storage.writable import StorageError, WritableStorage

SECRET = "hunter2"
CLOSED = "127.0.0.1:9"
"""Nothing listens there."""
URLS = [f"http://user:{SECRET}/x@{CLOSED}/mine", f"http://{SECRET}@{CLOSED}/mine", f"s3://bucket/mine?token={SECRET}"]


@pytest.fixture(autouse=True)
def one_attempt_and_nobody_there(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{CLOSED}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with caplog.at_level(logging.INFO):
        yield
    assert SECRET not in caplog.text
    assert SECRET not in "".join(map(str, caplog.records))


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "use",
    [
        load_index,
        lambda url: Storage(url).read("00000.tar"),
        lambda url: WritableStorage(url).write("x", [memoryview(b"x")]),
        lambda url: WritableStorage(url).read_if_there("x"),
    ],
    ids=["index", "read", "write", "read_if_there"],
)
def test_storage_out_of_reach_is_named_without_its_secret(use: Callable[[str], object], url: str) -> None:
    with pytest.raises((DataError, StorageError)) as refused:
        use(url)
    assert SECRET not in str(refused.value)
    assert SECRET not in repr(refused.value)
    assert "***" in str(refused.value)
    assert "mine" in str(refused.value)


@pytest.mark.parametrize("url", URLS)
def test_shards_and_cache_name_a_data_set_without_its_secret(prepared: ShardIndex, tmp_path, url: str) -> None:
    index = replace(prepared, location=url)
    assert SECRET not in index.shown_location
    for use in (
        lambda: index.directory,
        lambda: verify_shards(index, by="size", cache_directory=None),
        lambda: shard_files(index, cache_directory=str(tmp_path / "cache"), cache_gb=1e-9),
        lambda: shard_files(index, cache_directory=str(tmp_path / "cache"), cache_gb=1).open(index.shards[0]),
    ):
        with pytest.raises(DataError) as refused:
            use()
        assert SECRET not in str(refused.value)


def test_error_of_a_library_is_redacted_before_it_is_cut() -> None:
    from data.storage.failures import explain

    padding = "x" * 165
    failure = explain(ValueError(f"{padding} https://user:{SECRET}{'y' * 40}@host/mine"), "https")
    assert failure is not None
    assert SECRET not in str(failure)
