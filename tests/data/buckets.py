"""A real S3 interface on loopback."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem


@contextmanager
def bucket(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3FileSystem]:
    """An empty bucket; the environment leads this process and its children there."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for key, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(key, value)
    filesystem = S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    filesystem.mkdirs(name, exist_ok=True)
    with suppress(FileNotFoundError):  # moto keeps its buckets from one server of a process to the next
        filesystem.rm(list(filesystem.find(name)))
    try:
        yield filesystem
    finally:
        server.stop()
