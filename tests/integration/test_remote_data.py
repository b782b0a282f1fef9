"""Training over shards in a bucket and behind a web server ends with the weights of training over the folder."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from tests.data.servers import serve
from tests.launch import run_ranks
from tests.trainer.runs import assert_same_state, configure, state_of, train

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def bucket(tiny_digits: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of the digits in a real S3 interface, which the processes of the test find in their environment."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    storage = S3FileSystem(skip_instance_cache=True)
    storage.mkdirs("digits", exist_ok=True)
    storage.put(f"{tiny_digits}/", "digits/set/", recursive=True)
    yield "s3://digits/set"
    server.stop()


def train_ranks(tiny: tuple[str, ...], directory: Path, url: str, cache: Path) -> str:
    """Two ranks with a loader process each; returns what they print."""
    overrides = [*tiny, f"run.directory={directory}", f"data.path={url}", f"data.cache_directory={cache}"]
    overrides += ["data.loader_workers=1", "engine.backend=torch"]
    done = run_ranks(2, ["-m", "trainer.worker", "--config", "digits", *(x for o in overrides for x in ("--set", o))])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def cached(cache: Path) -> Mapping[str, bytes]:
    return {file.name: file.read_bytes() for file in cache.glob("*.tar")}


@pytest.mark.slow
@pytest.mark.multirank
def test_bucket_and_web_server_give_the_weights_of_the_folder(
    tiny: tuple[str, ...], tiny_digits: Path, bucket: str, tmp_path: Path
) -> None:
    local, cache = tmp_path / "local", tmp_path / "cache"
    train_ranks(tiny, local, str(tiny_digits), tmp_path / "unused")
    train_ranks(tiny, tmp_path / "s3", bucket, cache)
    assert_same_state(state_of(tmp_path / "s3", 10), state_of(local, 10))
    first = cached(cache)
    assert sorted(first.values()) == sorted(file.read_bytes() for file in tiny_digits.glob("*.tar"))

    with serve(tiny_digits) as server:
        shutil.rmtree(cache)
        train_ranks(tiny, tmp_path / "http", server.url, cache)
        shards = {name: count for name, count in server.gets.items() if name.endswith(".tar")}
        assert shards == dict.fromkeys((file.name for file in tiny_digits.glob("*.tar")), 1), "downloaded twice"
        assert_same_state(state_of(tmp_path / "http", 10), state_of(local, 10))
        # A second run on the same host finds everything in the cache.
        train_ranks(tiny, tmp_path / "again", server.url, cache)
        assert {name: count for name, count in server.gets.items() if name.endswith(".tar")} == shards
    assert cached(cache) == first


def test_altered_shard_in_a_bucket_ends_the_run_by_name(
    tiny: tuple[str, ...], tiny_digits: Path, bucket: str, tmp_path: Path
) -> None:
    storage = S3FileSystem(skip_instance_cache=True)
    content = bytearray((tiny_digits / "00000.tar").read_bytes())
    content[2000] ^= 1
    storage.pipe_file("digits/set/00000.tar", bytes(content))
    config = configure(tiny, tmp_path / "run", f"data.path={bucket}", f"data.cache_directory={tmp_path / 'cache'}")
    with pytest.raises(ValueError, match=r"shard 00000\.tar: s3://digits/set/00000\.tar was altered: its SHA-256 is"):
        train(config)
    assert not cached(tmp_path / "cache")
