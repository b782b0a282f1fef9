"""A preparation on a Ray of two nodes gives the bytes of one machine, though it is stopped and a node is killed."""

import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from s3fs import S3FileSystem

from data.prepare.command import main
from data.prepare.journal import load_journal
from tests.data.buckets import bucket
from tests.data.tables import write_hub_folder
from tests.launch import ROOT, default_signals

pytestmark = [pytest.mark.slow, pytest.mark.ray]
OPTIONS = ["--size", "64", "--shard-samples", "40", "--max-bad", "5", "--dedup", "exact"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 images, of which some are damaged and one is there twice."""
    root = tmp_path_factory.mktemp("source")
    for number in range(1200):
        draws = np.random.default_rng(number)
        pixels = draws.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((200, 200)).save(root / f"{number:04d}.jpg")
        if number % 50 == 7:
            (root / f"{number:04d}.jpg").write_bytes(b"\xff\xd8\xff" + draws.bytes(500))
    (root / "0500.jpg").write_bytes((root / "0400.jpg").read_bytes())
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a preparation in one process."""
    out = tmp_path_factory.mktemp("expected") / "set"
    assert main([str(source), "--out", str(out), *OPTIONS, "--workers", "0"]) == 0
    return contents(out)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray of two nodes with a CPU each; the environment leads there."""
    from ray.cluster_utils import Cluster

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", str(nodes.address))
    try:
        yield nodes
    finally:
        nodes.shutdown()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3FileSystem]:
    with bucket("prepared", monkeypatch) as filesystem:
        yield filesystem


def start(source: Path | str, out: str, *more: str, before: Sequence[str] = ()) -> "subprocess.Popen[str]":
    command = [*before, sys.executable, "-m", "data.prepare", str(source), "--out", out, *OPTIONS, *more, "--ray"]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=default_signals
    )


def wait_until(reached: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stopped_and_with_a_node_killed_it_gives_the_bytes_of_one_machine(
    source: Path, expected: dict[str, bytes], s3: S3FileSystem, cluster: Any, tmp_path: Path
) -> None:
    out = tmp_path / "set"
    journal = tmp_path / ".set.unfinished" / "journal.json"

    def num_finished() -> int:
        found = load_journal(journal)
        return 0 if found is None else len(found.finished)

    node = cluster.add_node(num_cpus=1)
    stopped = start(source, str(out))
    wait_until(lambda: num_finished() >= 2, stopped)
    os.kill(stopped.pid, signal.SIGINT)
    _, told = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, told
    assert "the same command continues after them" in told
    kept = num_finished()
    again = start(source, str(out))
    wait_until(lambda: num_finished() >= kept + 2, again)
    cluster.remove_node(node, allow_graceful=False)
    said, told = again.communicate(timeout=240)
    assert again.returncode == 0, told
    assert f"continuing after {kept} finished shards" in told
    assert "--dedup exact: 1" in said
    assert contents(out) == expected
    # And to a bucket, which the tasks write to.
    done = start(source, "s3://prepared/set")
    said, told = done.communicate(timeout=240)
    assert done.returncode == 0, told
    found = {name.rpartition("/")[2]: s3.cat_file(name) for name in s3.find("prepared/set")}
    assert found == expected
    # What only the driver can read, it sends along.
    tables = str(write_hub_folder(tmp_path / "tables"))
    assert main([tables, "--out", str(tmp_path / "one"), *OPTIONS, "--size", "16", "--workers", "0"]) == 0
    done = start(tables, str(tmp_path / "many"), "--size", "16")
    _, told = done.communicate(timeout=120)
    assert done.returncode == 0, told
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    if os.geteuid() == 0:  # only root mounts
        refuse_nodes_without_the_source(source, tmp_path)


def refuse_nodes_without_the_source(source: Path, folder: Path) -> None:
    """A folder that only the driver has: no image is left out for that."""
    (folder / "mounted").mkdir()
    mount = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(source)]
    done = start(folder / "mounted", str(folder / "none"), before=[*mount, str(folder / "mounted")])
    _, told = done.communicate(timeout=120)
    assert done.returncode == 1, told
    assert f"node {platform.node()} cannot read the image" in told
    assert "give every node the source under the same name" in told
    assert not (folder / "none").exists()
