"""The shared cache under several processes: once per host, whole or not at all, and never past its bound."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from data.shards.files import CachedShards
from data.shards.index import ShardIndex
from tests.data.servers import Fault, FaultyServer
from tests.launch import ROOT

pytestmark = pytest.mark.slow


def size_of(index: ShardIndex) -> int:
    """All shards of the test data have one size."""
    (size,) = {shard.num_bytes for shard in index.shards}
    return size


def cached(index: ShardIndex, folder: Path) -> set[int]:
    """Numbers of the shards whose files are in the folder."""
    return {number for number, shard in enumerate(index.shards) if (folder / f"{shard.sha256}.tar").exists()}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.01)


def stored_bytes(folder: Path) -> int:
    total = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


# A process of the host. It reads all shards and prints what it read.
READER = """
import hashlib, sys
from pathlib import Path
from data.storage import remote as storage
from data.shards.files import CachedShards
from data.shards.index import load_index
storage.FIRST_WAIT_S = 0.01
url, folder, capacity = sys.argv[1:4]
index = load_index(url)
files = CachedShards(index, Path(folder), int(capacity))
print("ready", flush=True)
sys.stdin.readline()
files.prefetch(index.shards)
for shard in index.shards:
    with open(files.open(shard), "rb") as file:
        print(shard.name, hashlib.file_digest(file, "sha256").hexdigest(), flush=True)
files.close()
"""


def start_reader(server: FaultyServer, folder: Path, capacity: int) -> subprocess.Popen[str]:
    """A process that waits for a line, then reads all shards."""
    process = subprocess.Popen(
        [sys.executable, "-c", READER, server.url, str(folder), str(capacity)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def finish(process: subprocess.Popen[str], index: ShardIndex) -> None:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.split("\n")[:-1] == [f"{shard.name} {shard.sha256}" for shard in index.shards]


def test_no_shard_is_downloaded_twice_by_the_processes_of_a_host(
    server: FaultyServer, index: ShardIndex, folder: Path
) -> None:
    processes = [start_reader(server, folder, 10**9) for _ in range(4)]
    for process in processes:
        start(process)
    for process in processes:
        finish(process, index)
    assert {name: count for name, count in server.gets.items() if name.endswith(".tar")} == {
        shard.name: 1 for shard in index.shards
    }
    assert {file.name for file in folder.iterdir()} == {f"{shard.sha256}.tar" for shard in index.shards} | {"lock"}


def test_half_a_download_of_a_killed_process_is_never_used(
    server: FaultyServer, index: ShardIndex, folder: Path
) -> None:
    shard = index.shards[0]
    server.faults[shard.name] = [Fault(stall_after=shard.num_bytes - 600)]
    process = start_reader(server, folder, 10**9)
    start(process)
    part = folder / f"{shard.sha256}.{shard.num_bytes}.part"
    wait_until(lambda: part.exists() and part.stat().st_size == shard.num_bytes - 600, "most of the shard is there")
    process.kill()
    process.communicate()
    assert part.exists()
    assert 0 not in cached(index, folder)
    cache = CachedShards(index, folder, 10**9)
    assert not list(folder.glob("*.part"))
    with open(cache.open(shard), "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    assert server.gets[shard.name] == 2


def test_process_that_waits_for_a_killed_one_downloads_in_its_place(
    server: FaultyServer, index: ShardIndex, folder: Path
) -> None:
    shard = index.shards[0]
    server.faults[shard.name] = [Fault(stall_after=600)]
    first, second = (start_reader(server, folder, size_of(index)) for _ in range(2))
    start(first)
    assert server.stalled.wait(20)
    start(second)
    time.sleep(0.3)
    assert server.gets[shard.name] == 1
    first.send_signal(signal.SIGKILL)
    first.communicate()
    finish(second, index)
    assert server.gets[shard.name] == 2


def test_bound_holds_at_all_times_while_more_is_read_than_fits(
    server: FaultyServer, index: ShardIndex, folder: Path
) -> None:
    capacity = 3 * size_of(index)
    processes = [start_reader(server, folder, capacity) for _ in range(2)]
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, stored_bytes(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for process in processes:
        start(process)
    for process in processes:
        finish(process, index)
    over.set()
    watcher.join()
    assert 2 * size_of(index) < most <= capacity
    assert len(cached(index, folder)) == 3


FULL_DISK = """
set -e
mount -t tmpfs -o size=16k none "$1"
exec "$2" -c "$3" "$4" "$1" 1000000000
"""


def test_disk_that_fills_during_a_download_is_one_line(server: FaultyServer, index: ShardIndex, tmp_path: Path) -> None:
    arguments = [str(tmp_path), sys.executable, READER, server.url]
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    allowed = subprocess.run([*namespace, 'mount -t tmpfs none "$1"', "sh", str(tmp_path)], capture_output=True)
    if allowed.returncode:
        pytest.skip("no file system can be mounted here")
    process = subprocess.run(
        [*namespace, FULL_DISK, "sh", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input="\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    place = f"shard 00000.tar: cache {tmp_path}"
    told = f"data.storage.location.DataError: {place}: no space left on its disk for {size_of(index)} b"
    assert [line for line in process.stderr.split("\n") if line.startswith(told)]
    assert server.gets["00000.tar"] <= 2
