"""Training over shards in a bucket and behind a web server ends with the weights of training over the folder."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from tests.data.servers import serve
from tests.launch import run_python, run_ranks
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


def overrides(tiny: tuple[str, ...], directory: Path, url: str, cache: Path) -> list[str]:
    more = (f"run.directory={directory}", f"data.path={url}", f"data.cache_directory={cache}")
    return [*tiny, *more, "data.loader_workers=1", "engine.backend=torch"]


def cached(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in cache.glob("*.tar")}


@pytest.mark.slow
@pytest.mark.multirank
def test_bucket_and_web_server_give_the_weights_of_the_folder(
    tiny: tuple[str, ...], tiny_digits: Path, bucket: str, tmp_path: Path
) -> None:
    caches = {name: tmp_path / f"cache-{name}" for name in ("local", "s3", "http")}
    with serve(tiny_digits) as server:

        def downloads() -> dict[str, int]:
            return {name: count for name, count in server.gets.items() if name.endswith(".tar")}

        urls = {"local": str(tiny_digits), "s3": bucket, "http": server.url}
        runs = [overrides(tiny, tmp_path / name, url, caches[name]) for name, url in urls.items()]
        # Two ranks with a loader process each, which train one run after the other.
        done = run_ranks(2, ["-m", "tests.trainer.consecutive_runs", *(json.dumps(run) for run in runs)])
        assert done.returncode == 0, done.stderr[-3000:]
        for name in ("s3", "http"):
            assert_same_state(state_of(tmp_path / name, 10), state_of(tmp_path / "local", 10))
        shards = {file.name: file.read_bytes() for file in tiny_digits.glob("*.tar")}
        assert downloads() == dict.fromkeys(shards, 1), "downloaded twice"
        # A second run on the same host finds everything in the cache.
        again = overrides(tiny, tmp_path / "again", server.url, caches["http"])
        done = run_python(["-m", "trainer.worker", "--config", "digits", *(x for o in again for x in ("--set", o))])
        assert done.returncode == 0, done.stderr[-3000:]
        assert downloads() == dict.fromkeys(shards, 1)
    for name in ("s3", "http"):
        assert sorted(cached(caches[name]).values()) == sorted(shards.values())
    assert not cached(caches["local"])


@pytest.mark.slow
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
