"""The real command, killed, stopped, started twice and on a full disk: it continues, or leaves nothing."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from data.prepare.command import main
from data.prepare.journal import load_journal
from tests.launch import ROOT, default_signals

pytestmark = pytest.mark.slow

Refusal = Callable[..., str]
OPTIONS = ["--size", "64", "--shard-samples", "8"]
NUM_IMAGES = 160
NUM_SHARDS = 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that take about a second to prepare."""
    root = tmp_path_factory.mktemp("source")
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (400, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.image", "PNG", compress_level=1)
    for number in range(NUM_IMAGES):
        (root / f"{number:03d}.png").symlink_to(f"{number % 8}.image")
    return root


@pytest.fixture(scope="module")
def unbroken(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a preparation that nothing stopped."""
    out = tmp_path_factory.mktemp("unbroken") / "set"
    assert main([str(source), "--out", str(out), *OPTIONS, "--workers", "0"]) == 0
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _as_a_user_starts_it() -> None:
    default_signals()
    # On a busy machine the test must see a shard before the command has finished all of them.
    os.nice(5)


class Command:
    """The command in a process group of its own, as a terminal starts it."""

    def __init__(self, source: Path, out: Path, *options: str) -> None:
        self.out = out
        self._process = subprocess.Popen(
            [sys.executable, "-m", "data.prepare", str(source), "--out", str(out), *options],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_as_a_user_starts_it,
        )
        self.pid = self._process.pid

    @property
    def work(self) -> Path:
        return self.out.parent / f".{self.out.name}.unfinished"

    def wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not reached():
            assert self._process.poll() is None, self._process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def wait_for_shards(self, number: int) -> None:
        self.wait_until(lambda: len(finished(self.work)) >= number)

    def signal(self, which: signal.Signals) -> None:
        os.killpg(self.pid, which)

    def end(self) -> tuple[int, str]:
        told = self._process.communicate(timeout=60)[1]
        return self._process.returncode, told

    def kill(self) -> None:
        """SIGKILL to the command alone; its workers have to notice."""
        children = psutil.Process(self.pid).children(recursive=True)
        self._process.kill()
        # Not `communicate`: it would wait for the workers, which hold the other end of the pipe.
        self._process.wait(timeout=10)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive, "the workers of a killed command still run"
        self._process.communicate()


def finished(work: Path) -> list[str]:
    journal = load_journal(work / "journal.json")
    return [] if journal is None else [shard.name for shard in journal.shards]


@pytest.fixture
def start(source: Path) -> Iterator[Callable[..., Command]]:
    """Starts commands, and ends those that a failed test leaves."""
    commands: list[Command] = []

    def start_one(out: Path, *options: str) -> Command:
        commands.append(Command(source, out, *OPTIONS, *options))
        return commands[-1]

    yield start_one
    for command in commands:
        if psutil.pid_exists(command.pid):
            command.signal(signal.SIGKILL)


Start = Callable[..., Command]


@pytest.mark.parametrize("workers", [("0", "2"), ("2", "0")], ids=["alone first", "workers first"])
def test_killed_command_continues_and_gives_the_same_bytes(
    tmp_path: Path, start: Start, unbroken: dict[str, bytes], workers: tuple[str, str]
) -> None:
    command = start(tmp_path / "set", "--workers", workers[0])
    command.wait_for_shards(4)
    command.kill()
    names = finished(command.work)
    assert 4 <= len(names) < NUM_SHARDS
    before = {name: (command.work / "set" / name).stat() for name in names}

    again = start(tmp_path / "set", "--workers", workers[1])
    code, told = again.end()
    assert code == 0
    # The shard that was just finished may not have reached the journal that this test has read.
    assert f"data.prepare: continuing after {len(names)} finished shards, " in told
    assert told.count("\n") == 1
    assert contents(tmp_path / "set") == unbroken
    after = {name: (tmp_path / "set" / name).stat() for name in names}
    for name in names:
        assert (after[name].st_ino, after[name].st_mtime_ns) == (before[name].st_ino, before[name].st_mtime_ns)
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


def test_command_that_is_killed_again_and_again_gets_there(
    tmp_path: Path, start: Start, unbroken: dict[str, bytes]
) -> None:
    reached = 0
    for _ in range(2):
        command = start(tmp_path / "set", "--workers", "0")
        command.wait_for_shards(reached + 1)
        command.kill()
        assert len(finished(command.work)) > reached
        reached = len(finished(command.work))
    assert start(tmp_path / "set", "--workers", "0").end()[0] == 0
    assert contents(tmp_path / "set") == unbroken


@pytest.mark.parametrize(
    ("workers", "how"),
    [("0", signal.SIGTERM), ("2", signal.SIGINT), ("2", signal.SIGTERM), ("2", signal.SIGHUP)],
    ids=str,
)
def test_stopped_command_keeps_the_finished_shards(
    tmp_path: Path, start: Start, unbroken: dict[str, bytes], workers: str, how: signal.Signals
) -> None:
    command = start(tmp_path / "set", "--workers", workers)
    command.wait_for_shards(3)
    # As a terminal does it: to every process of the command.
    command.signal(how)
    code, told = command.end()
    num_shards = len(finished(command.work))
    assert code == 130
    assert told == (
        f"data.prepare: interrupted; {num_shards} finished shards are kept in {command.work}: "
        "the same command continues after them\n"
    )
    assert 3 <= num_shards < NUM_SHARDS
    assert start(tmp_path / "set", "--workers", "0").end()[0] == 0
    assert contents(tmp_path / "set") == unbroken


def test_command_stopped_within_the_first_shard_leaves_nothing(tmp_path: Path, start: Start) -> None:
    command = start(tmp_path / "out" / "set", "--workers", "0", "--shard-samples", "1000")
    command.wait_until((command.work / "set" / "00000.tar").exists)
    command.signal(signal.SIGINT)
    assert command.end() == (
        130,
        "data.prepare: interrupted; nothing is left behind, run the same command again\n",
    )
    assert list(tmp_path.iterdir()) == []


def test_killed_worker_fails_the_command_and_keeps_the_finished_shards(
    tmp_path: Path, start: Start, unbroken: dict[str, bytes]
) -> None:
    command = start(tmp_path / "set", "--workers", "2")
    command.wait_for_shards(2)
    workers = [worker for child in psutil.Process(command.pid).children() for worker in child.children()]
    assert len(workers) == 2
    workers[0].kill()
    code, told = command.end()
    num_shards = len(finished(command.work))
    assert code == 1
    assert told == (
        "data.prepare: a worker process was killed, most likely for want of memory; run again with fewer --workers; "
        f"{num_shards} finished shards are kept in {command.work}: the same command continues after them\n"
    )
    assert start(tmp_path / "set", "--workers", "0").end()[0] == 0
    assert contents(tmp_path / "set") == unbroken


def test_second_command_on_the_same_target_is_refused(
    source: Path, tmp_path: Path, start: Start, refusal: Refusal, unbroken: dict[str, bytes]
) -> None:
    command = start(tmp_path / "set", "--workers", "0")
    command.wait_for_shards(1)
    told = refusal(source, "--out", tmp_path / "set", *OPTIONS, "--workers", "0")
    assert f"--out {tmp_path}/set is being prepared by process {command.pid} on " in told
    assert "wait for it, or choose another --out" in told
    # Other options are no way around it.
    assert "is being prepared by" in refusal(source, "--out", tmp_path / "set", "--size", "32")
    assert command.end() == (0, "")
    assert contents(tmp_path / "set") == unbroken
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


def test_work_of_other_options_is_discarded_in_one_line(
    source: Path, tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str], unbroken: dict[str, bytes]
) -> None:
    command = start(tmp_path / "set", "--workers", "0", "--seed", "7")
    command.wait_for_shards(2)
    command.kill()
    assert main([str(source), "--out", str(tmp_path / "set"), *OPTIONS, "--workers", "0"]) == 0
    told = f"other unfinished work in {command.work} is discarded (seed is 7 there, 0 here)"
    assert capsys.readouterr().err == f"data.prepare: {told}\n"
    assert contents(tmp_path / "set") == unbroken


def in_small_disk(folder: Path, source: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in a mount namespace where the folder is a file system of one megabyte."""
    unshare = shutil.which("unshare")
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" || exit 99; '
    if (
        unshare is None
        or subprocess.run([unshare, "-rm", "sh", "-c", mount, "sh", str(folder)], capture_output=True).returncode
    ):
        pytest.skip("this system lets no user mount a file system in a namespace of its own")
    return subprocess.run(
        [unshare, "-rm", "sh", "-c", mount + command, "sh", str(folder), sys.executable, str(source)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_really_full_disk_is_one_line_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    done = in_small_disk(
        tmp_path,
        source,
        '"$2" -m data.prepare "$3" --out "$1/deep/set" --size 160 --shard-samples 16 --workers 0; '
        'code=$?; ls -A "$1"; exit $code',
    )
    assert done.returncode == 1
    assert done.stderr == (
        "data.prepare: the disk of --out is full; nothing is left behind: free some space or choose another disk\n"
    )
    assert done.stdout == ""


def test_disk_that_is_full_from_the_start_is_told_the_same(source: Path, tmp_path: Path) -> None:
    done = in_small_disk(
        tmp_path,
        source,
        'head -c 1100000 /dev/zero >"$1/full" 2>/dev/null; "$2" -m data.prepare "$3" --out "$1/set" --size 64; '
        'code=$?; ls -A "$1"; exit $code',
    )
    assert done.returncode == 1
    assert "the disk of --out is full; nothing is left behind" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == "full\n"
