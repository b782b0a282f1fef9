"""Remote files: the same bytes, retries of what may pass, and what each failure is told."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.config import conf as fsspec_settings
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from data.shards.index import ShardIndex, load_index
from data.storage import remote as storage
from data.storage.location import DataError
from data.storage.redaction import redact
from data.storage.remote import AbandonedError, Storage
from data.storage.remote_folder import RemoteFolder
from tests.data.servers import Fault, FaultyServer, serve

SHARD = "00002.tar"


@pytest.fixture
def server(prepared: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """The prepared data set over HTTP; the client hardly pauses between attempts."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve(prepared.directory) as state:
        yield state


def be_impatient(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> bool:
    """With a fault that stalls, wait half a second only, in which a busy machine may stall a good answer, too."""
    if stalls := fault.stall_after is not None:
        monkeypatch.setattr(storage, "STALL_S", 0.5)
    return stalls


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def use_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3(prepared: ShardIndex, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of the prepared data set in a bucket."""
    use_s3(monkeypatch, s3_endpoint)
    bucket = S3FileSystem(skip_instance_cache=True)
    bucket.mkdirs("images", exist_ok=True)
    bucket.put(f"{prepared.directory}/", "images/sets/tiny/", recursive=True)
    return "s3://images/sets/tiny"


def read_all(index: ShardIndex, folder: Path) -> dict[str, bytes]:
    remote = Storage(index.location)
    for shard in index.shards:
        remote.download(shard.name, folder / shard.name, num_bytes=shard.num_bytes)
    return {shard.name: (folder / shard.name).read_bytes() for shard in index.shards}


def expected(prepared: ShardIndex) -> dict[str, bytes]:
    return {shard.name: (prepared.directory / shard.name).read_bytes() for shard in prepared.shards}


def test_data_set_over_http_is_the_one_on_disk(prepared: ShardIndex, server: FaultyServer, tmp_path: Path) -> None:
    index = load_index(f"{server.url}/")
    assert (index.location, index.is_remote) == (server.url, True)
    assert (index.shards, index.digest) == (prepared.shards, prepared.digest)
    assert read_all(index, tmp_path) == expected(prepared)


def test_data_set_in_a_bucket_is_the_one_on_disk(prepared: ShardIndex, s3: str, tmp_path: Path) -> None:
    index = load_index(s3)
    assert (index.location, index.digest) == ("s3://images/sets/tiny", prepared.digest)
    assert read_all(index, tmp_path) == expected(prepared)


def test_data_set_on_a_filesystem_without_a_loop_is_the_one_on_disk(prepared: ShardIndex, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{prepared.directory}/", "/place/set", recursive=True)
    try:
        assert read_all(load_index("memory://place/set"), tmp_path) == expected(prepared)
        with pytest.raises(DataError, match=r"index\.json: .*memory://place/index\.json: there is no such file"):
            load_index("memory://place")
    finally:
        memory.rm("/place", recursive=True)


def test_file_url_is_a_local_folder(prepared: ShardIndex) -> None:
    index = load_index(f"file://{prepared.directory}")
    assert index == prepared
    assert not index.is_remote
    with pytest.raises(DataError, match="names no folder of this host"):
        load_index("file://elsewhere/data")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("pipe:touch {marker}", "pipe: is no storage; allowed are a local folder, http"),
        ("pipe:touch {marker} && cat s3://a/b", "pipe: is no storage"),
        ("s3://bucket/set::pipe:touch {marker}", "chained URLs are not read"),
        ("simplecache::s3://bucket/set", "chained URLs are not read"),
        ("cached://set", "cached: is no storage"),
        ("nonsense://bucket/set", r"nonsense: is no storage.* Write \./ before a folder of that name"),
        ("s3:bucket/set", r"not a URL of the form s3://place/folder"),
        ("http://", r"not a URL of the form http://place/folder"),
        ("https://host/set?key=secret", "https://host/set: a URL with"),
        ("s3://bucket/a\nb", r"'s3://bucket/a\\nb': not a URL"),
    ],
)
def test_what_is_no_storage_is_refused_in_a_line_and_never_run(url: str, told: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises(DataError, match=told) as caught:
        load_index(url.format(marker=marker))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not marker.exists()


def test_metacharacters_in_a_path_are_only_characters(server: FaultyServer, s3: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for path in (f"{server.url}/;touch {marker};$(touch {marker})`touch {marker}`|x", f"{s3};touch {marker};$(x)"):
        with pytest.raises(DataError, match="there is no such file"):
            load_index(path)
    with pytest.raises(DataError, match="there is no such folder"):
        load_index(f"{tmp_path}/; touch {marker}")
    assert not marker.exists()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs://bucket/set: a package is missing to read it: .*install gcsfs"):
        load_index("gs://bucket/set")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(status=503), "HTTP 503 Service Unavailable"),
        (Fault(status=500), "HTTP 500 Internal Server Error"),
        (Fault(status=429), "HTTP 429 Too Many Requests"),
        (Fault(status=408), "HTTP 408 Request Timeout"),
        (Fault(cut_after=700), "the answer was cut short"),
        (Fault(cut_after=0), "the answer was cut short"),
        (Fault(stall_after=700), "it stalled: no byte for 0.5 s|no answer in time"),
        (Fault(stall_after=0), "it stalled: no byte for 0.5 s|no answer in time"),
    ],
)
def test_what_may_pass_is_tried_again_and_logged(
    prepared: ShardIndex,
    server: FaultyServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    reason: str,
) -> None:
    stalls = be_impatient(monkeypatch, fault)
    server.faults[SHARD] = [fault, fault]
    with caplog.at_level(logging.WARNING):
        Storage(server.url).download(SHARD, tmp_path / SHARD, num_bytes=prepared.shards[2].num_bytes)
    assert (tmp_path / SHARD).read_bytes() == expected(prepared)[SHARD]
    lines = [record.getMessage() for record in caplog.records if record.name == "data.storage.remote"]
    assert (server.gets[SHARD], len(lines)) == (3, 2) or (stalls and server.gets[SHARD] >= 3 and len(lines) > 2)
    for number, line in enumerate(lines, start=1):
        assert line.startswith(f"shard {SHARD}: ")
        assert any(part in line for part in reason.split("|"))
        assert f"(attempt {number} of 6, next in " in line


def test_server_that_hangs_up_is_tried_again(
    prepared: ShardIndex, server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults[SHARD] = [Fault(hangs_up=True)] * 3
    Storage(server.url).download(SHARD, tmp_path / SHARD, num_bytes=prepared.shards[2].num_bytes)
    assert (tmp_path / SHARD).read_bytes() == expected(prepared)[SHARD]
    assert "the connection failed (ServerDisconnectedError" in caplog.text


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (403, r"permission denied \(HTTP 403\); put user:password@ before the host"),
        (401, r"permission denied \(HTTP 401\)"),
        (404, r"there is no such file; check the URL; all files of"),
        (400, "HTTP 400 Bad Request"),
    ],
)
def test_what_will_not_pass_is_tried_once(server: FaultyServer, tmp_path: Path, status: int, told: str) -> None:
    server.faults[SHARD] = [Fault(status=status)]
    with pytest.raises(DataError, match=rf"shard {SHARD}: cannot read {server.url}/{SHARD}: {told}"):
        Storage(server.url).download(SHARD, tmp_path / SHARD)
    assert server.gets[SHARD] == 1


def test_tries_are_bounded(server: FaultyServer, tmp_path: Path) -> None:
    server.always = Fault(status=503)
    told = rf"cannot read {server.url}/{SHARD}: HTTP 503 Service Unavailable \(6 attempts in \d+ s\); try again later"
    with pytest.raises(DataError, match=told):
        Storage(server.url).download(SHARD, tmp_path / SHARD)
    assert server.gets[SHARD] == 6


def test_pauses_double_up_to_a_bound_and_come_to_about_a_minute(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 2.0)

    class Clock(threading.Event):
        pauses: list[float] = []  # noqa: RUF012

        def wait(self, timeout: float | None = None) -> bool:
            self.pauses.append(timeout or 0)
            return False

    server.always = Fault(status=503)
    with pytest.raises(DataError):
        Storage(server.url).download(SHARD, tmp_path / SHARD, stop=Clock())
    assert [int(pause - least) for pause, least in zip(Clock.pauses, (2, 4, 8, 16, 20), strict=True)] == [0] * 5


def test_refused_connections_are_tried_again(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    with pytest.raises(DataError, match=r"the connection was refused \(2 attempts in 0 s\); check the address"):
        load_index("http://127.0.0.1:1/set")
    use_s3(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(DataError, match=r"connect.* \(2 attempts in \d s\); check AWS_ENDPOINT_URL"):
        load_index("s3://bucket/set")


def test_unknown_host_is_told(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    with pytest.raises(DataError, match=r"http://no-such-host\.invalid/set/index\.json: the host's name cannot be res"):
        load_index("http://no-such-host.invalid/set")


@pytest.mark.parametrize("size", [700, 30000])
def test_file_of_another_size_is_refused_at_once(
    prepared: ShardIndex, server: FaultyServer, tmp_path: Path, size: int
) -> None:
    server.faults[SHARD] = [Fault(content=bytes(size))]
    stated = prepared.shards[2].num_bytes
    with pytest.raises(DataError, match=rf"{SHARD}: it has (700 bytes|more), the index says {stated}; upload it again"):
        Storage(server.url).download(SHARD, tmp_path / SHARD, num_bytes=stated)
    assert server.gets[SHARD] == 1


def test_password_is_sent_and_never_shown(
    server: FaultyServer, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    url = server.url.replace("//", "//ann:s3cret@")
    index = load_index(url)
    assert server.authorizations == {"Basic YW5uOnMzY3JldA=="}
    server.faults[SHARD] = [Fault(status=503), Fault(status=403)]
    with caplog.at_level(logging.DEBUG, logger="data"), pytest.raises(DataError) as caught:
        Storage(index.location).download(SHARD, tmp_path / SHARD)
    shown = f"{caught.value} {caplog.text} {index!r} {index.shown_location}"
    assert "s3cret" not in shown
    assert index.shown_location == redact(url) == server.url.replace("//", "//***@")


def test_sizes_are_asked_for_without_reading(prepared: ShardIndex, server: FaultyServer, s3: str) -> None:
    names = [shard.name for shard in prepared.shards]
    sizes = {shard.name: shard.num_bytes for shard in prepared.shards}
    for url in (server.url, s3):
        assert Storage(url).sizes([*names, "00099.tar"]) == sizes
    assert not set(names) & set(server.gets)


def test_server_that_is_away_has_not_lost_its_files(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    for url, told in (
        ("http://127.0.0.1:1/set", r"the connection was refused \(2 attempts"),
        ("http://no-such-host.invalid/set", "the host's name cannot be resolved"),
    ):
        with pytest.raises(DataError, match=told):
            Storage(url).sizes(["0.tar"])
        with pytest.raises(DataError, match=told):
            RemoteFolder(url).ask("set.zip")
    server.always = Fault(hangs_up=True)
    with pytest.raises(DataError, match=r"the connection failed \(ServerDisconnectedError.*2 attempts"):
        RemoteFolder(server.url).ask("set.zip")


def test_sizes_that_cannot_be_asked_for_are_an_error(server: FaultyServer) -> None:
    server.always = Fault(status=403)
    with pytest.raises(DataError, match=r"shard 0\.tar: cannot read .*permission denied \(HTTP 403\)"):
        Storage(server.url).sizes(["0.tar"])
    server.always = Fault(status=503)
    with pytest.raises(DataError, match=r"shard \d+\.tar: cannot read .*HTTP 503 Service Unavailable \(6 attempts"):
        Storage(server.url).sizes([f"{number}.tar" for number in range(100)])


@pytest.mark.slow
def test_bucket_key_and_access_that_are_not_there_are_told(
    server: FaultyServer, s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"s3://no-bucket/set/index\.json: there is no such bucket \(HTTP 404\)"):
        load_index("s3://no-bucket/set")
    with pytest.raises(DataError, match=r"s3://images/other/index\.json: there is no such file \(HTTP 404\)"):
        load_index("s3://images/other")
    use_s3(monkeypatch, server.url.removesuffix("/data/set"))
    server.always = Fault(status=403)
    with pytest.raises(DataError, match=r"permission denied \(HTTP 403\); set AWS_ACCESS_KEY_ID and") as caught:
        load_index(s3)
    assert "AWS_ENDPOINT_URL" in str(caught.value)
    assert server.gets["index.json"] == 1
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"index\.json: there are no credentials; set AWS_ACCESS_KEY_ID"):
        load_index(s3)


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(cut_after=700), Fault(stall_after=700)])
def test_bucket_that_fails_for_a_while_is_tried_again(
    prepared: ShardIndex, server: FaultyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: Fault
) -> None:
    use_s3(monkeypatch, server.url.removesuffix("/data/set"))
    stalls = be_impatient(monkeypatch, fault)
    server.faults[SHARD] = [fault, fault]
    Storage("s3://images/set").download(SHARD, tmp_path / SHARD, num_bytes=prepared.shards[2].num_bytes)
    assert (tmp_path / SHARD).read_bytes() == expected(prepared)[SHARD]
    assert server.gets[SHARD] == 3 or (stalls and server.gets[SHARD] > 3)


def test_public_bucket_is_read_without_credentials_when_told(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_s3(monkeypatch, server.url.removesuffix("/data/set"))
    monkeypatch.setitem(fsspec_settings, "s3", {"anon": True})
    assert load_index("s3://images/set").num_samples == 40
    assert server.authorizations == {None}


def test_transfer_that_stalls_ends_at_once_when_it_is_abandoned(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "STALL_S", 60.0)
    server.faults[SHARD] = [Fault(stall_after=700)]
    stop = threading.Event()
    threading.Thread(target=lambda: (server.stalled.wait(), stop.set())).start()
    began = time.monotonic()
    with pytest.raises(AbandonedError):
        Storage(server.url).download(SHARD, tmp_path / SHARD, stop=stop)
    assert time.monotonic() - began < 5


def test_forked_child_makes_connections_of_its_own(prepared: ShardIndex, server: FaultyServer, tmp_path: Path) -> None:
    remote = Storage(server.url)
    content = remote.read("index.json")
    child = os.fork()
    if child == 0:
        os._exit(0 if remote.read("index.json") == content else 1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
        time.sleep(0.02)
    assert ended == (child, 0)
    # The parent's own ones still work.
    assert remote.read("index.json") == content
