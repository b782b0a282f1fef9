"""A step is held for the copy alone; what fails is loud, tried again, and never costs a checkpoint."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.launch import environment, run_ranks
from tests.trainer.checkpoint.saved import fragments, save, write, writer
from trainer.checkpoint.format import list_checkpoints, newest_valid
from trainer.checkpoint.lease import LeaseError
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.storage import FolderStorage
from trainer.engine.ranks import Ranks


@pytest.fixture
def ranks():
    joined = Ranks.join("cpu", 60)
    yield joined
    joined.leave()


class Gate(FolderStorage):
    """A folder whose writes wait until they are let through, and fail as often as they are told to."""

    def __init__(self, folder: Path, failures: int = 0) -> None:
        super().__init__(folder)
        self.open, self.reached = threading.Event(), threading.Event()
        self.failures = failures

    def write(self, checkpoint: str, name: str, chunks: Iterable[memoryview]) -> None:
        self.reached.set()
        assert self.open.wait(60)
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(checkpoint, name, chunks)


def test_save_returns_before_anything_is_written_and_training_may_change_the_state(tmp_path, ranks):
    gate = Gate(tmp_path)
    to = writer(gate, ranks)
    state = fragments()
    to.save(5, {"generator": state}, {}, {"config": {}})
    state[0].tensors["parameter"].fill_(-1.0)
    assert gate.reached.wait(60)
    assert not list(tmp_path.iterdir())
    assert to.take_times() == {}
    gate.open.set()
    assert to.finish() == (5, "")
    times = to.take_times()
    assert 0 < times["held_s"] < times["written_s"]
    assert to.take_times() == {}
    found = newest_valid(tmp_path)
    assert found
    assert found.section("generator").read("parameter", "layer.weight", 0, 10).tolist() == list(range(10))


def test_second_save_waits_for_the_first_so_that_one_snapshot_is_in_memory(tmp_path, ranks):
    gate = Gate(tmp_path)
    to = writer(gate, ranks)
    save(to, 1)
    second = threading.Thread(target=save, args=(to, 2))
    second.start()
    assert gate.reached.wait(60)
    second.join(0.2)
    assert second.is_alive()
    assert not list_checkpoints(tmp_path)
    gate.open.set()
    second.join(60)
    assert to.finish() == (2, "")
    assert [c.step for c in list_checkpoints(tmp_path)] == [1, 2]
    for checkpoint in list_checkpoints(tmp_path):
        checkpoint.verify()


def test_write_that_fails_is_logged_and_tried_again(tmp_path, ranks, caplog):
    gate = Gate(tmp_path, failures=2)
    gate.open.set()
    to = writer(gate, ranks)
    save(to, 3)
    assert to.finish() == (3, "")
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 2
    assert all("rank 0 cannot write" in e and "No space left on device; once more" in e for e in errors)
    assert to.take_failures() == 0


def test_save_that_fails_for_good_counts_leaves_the_earlier_and_the_next_one_succeeds(tmp_path, ranks, caplog):
    write(tmp_path, ranks, 1)
    gate = Gate(tmp_path, failures=3)
    gate.open.set()
    to = writer(gate, ranks, newest_step=1, retention=Retention(keep_last=1))
    save(to, 2)
    newest, error = to.finish()
    assert newest == 1
    assert error.startswith("checkpoint of step 2 was not saved: rank 0 cannot write")
    assert error in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert (to.take_failures(), to.take_failures()) == (1, 0)
    save(to, 3)
    assert to.finish() == (3, "")
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_manifest_that_cannot_be_written_is_a_failure_too(tmp_path, ranks, monkeypatch):
    def full(_: object, checkpoint: str, manifest: bytes) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FolderStorage, "commit", full)
    to = writer(tmp_path, ranks)
    save(to, 2)
    newest, error = to.finish()
    assert newest is None
    assert "cannot write" in error and "manifest.json: [Errno 5] Input/output error" in error
    assert not list(tmp_path.iterdir())


def test_run_that_lost_its_lease_commits_nothing_and_deletes_nothing(tmp_path, ranks):
    write(tmp_path, ranks, 1)

    def lost() -> None:
        raise LeaseError(["another run took it over"])

    to = writer(tmp_path, ranks, check_claim=lost)
    save(to, 2)
    with pytest.raises(LeaseError, match="another run took it over"):
        to.finish()
    with pytest.raises(LeaseError):
        save(to, 3)
    assert [c.step for c in list_checkpoints(tmp_path)] == [1]


@pytest.mark.parametrize("failures", [0, 3])
def test_group_that_lost_its_lease_spoils_no_checkpoint_of_the_same_step(tmp_path, ranks, failures):
    write(tmp_path, ranks, 1)
    write(tmp_path, ranks, 2)

    def lost() -> None:
        raise LeaseError(["another run took it over"])

    gate = Gate(tmp_path, failures)  # on a full disk it would clear away what it believes to be remains
    gate.open.set()
    to = writer(gate, ranks, check_claim=lost, token="dead")
    save(to, 2)
    with pytest.raises(LeaseError):
        to.finish()
    found = newest_valid(tmp_path)
    assert found and found.step == 2
    assert found.section("generator").read("parameter", "layer.weight", 0, 10).tolist() == list(range(10))


def test_part_that_has_gone_when_its_checkpoint_is_committed_is_a_failed_save(tmp_path, ranks, monkeypatch):
    write(tmp_path, ranks, 1)

    def commit(storage: FolderStorage, checkpoint: str, manifest: bytes) -> None:
        real(storage, checkpoint, manifest)
        (storage.folder / checkpoint / "rank-00000.safetensors").unlink()

    real = FolderStorage.commit
    monkeypatch.setattr(FolderStorage, "commit", commit)
    to = writer(tmp_path, ranks, newest_step=1, retention=Retention(keep_last=1))
    save(to, 2)
    newest, error = to.finish()
    assert (newest, to.take_failures()) == (1, 1)
    assert "step 2 was not saved" in error and "is missing" in error
    found = newest_valid(tmp_path)
    assert found and found.step == 1


def test_late_writer_of_an_earlier_start_does_not_touch_the_new_file(tmp_path, ranks):
    """A process believed dead has its file still open when another writes one of that name."""
    storage = FolderStorage(tmp_path)
    storage.write("step-00000001", "rank-00000.safetensors", [memoryview(b"old")])
    file = tmp_path / "step-00000001" / "rank-00000.safetensors"
    with file.open("r+b") as late:
        storage.write("step-00000001", "rank-00000.safetensors", [memoryview(b"new")])
        late.write(b"bad")
    assert file.read_bytes() == b"new"


def test_closing_ends_the_thread_of_a_save(tmp_path, ranks):
    to = writer(tmp_path, ranks)
    save(to, 1)
    to.close()
    assert not [t for t in threading.enumerate() if t.name == "checkpoint"]
    assert [c.step for c in list_checkpoints(tmp_path)] == [1]


SMALL_DISK = """
import errno, sys, time
from pathlib import Path
import torch
from tests.trainer.checkpoint.saved import save, write, writer
from trainer.checkpoint import lease as leases
from trainer.checkpoint.format import newest_valid
from trainer.engine.interface import Fragment
from trainer.checkpoint.lease import acquire
from trainer.checkpoint.lease_places import FolderLease
from trainer.engine.ranks import Ranks
from trainer.checkpoint.retention import Retention
leases.HEARTBEAT_S = 0.05
folder, ranks = Path(sys.argv[1]), Ranks.join("cpu", 60)
lease = acquire(FolderLease(folder), "launch")
checkpoints = folder / "checkpoints"
write(checkpoints, ranks, 1)
to = writer(checkpoints, ranks, newest_step=1, retention=Retention(keep_last=1), check_claim=lease.check)
large = {"generator": [Fragment("layer.weight", 0, {"parameter": torch.ones(300_000)})]}
to.save(2, large, {}, {"config": {}})
newest, error = to.finish()
assert newest == 1 and "No space left on device" in error, (newest, error)
assert [p.name for p in checkpoints.iterdir()] == ["step-00000001"]
assert newest_valid(checkpoints).step == 1
filler = (folder / "filler").open("wb", buffering=0)
try:
    while True:
        filler.write(bytes(512))
except OSError as full:
    assert full.errno == errno.ENOSPC
save(to, 3)
assert to.finish()[0] == 1 and newest_valid(checkpoints).step == 1
seen, deadline = FolderLease(folder).read(), time.monotonic() + 30
while FolderLease(folder).read() == seen:  # the heartbeat continues
    assert time.monotonic() < deadline
    time.sleep(0.01)
lease.check()
filler.close()
(folder / "filler").unlink()
save(to, 4)
assert to.finish() == (4, "") and newest_valid(checkpoints).step == 4
lease.check()
to.close()
ranks.leave()
print("all held")
"""


@pytest.mark.slow
def test_full_disk_loses_neither_the_last_checkpoint_nor_the_lease(tmp_path):
    unshare = shutil.which("unshare")
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" || exit 99; '
    probe = [unshare or "", "-rm", "sh", "-c", mount, "sh", str(tmp_path)]
    if unshare is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this system lets no user mount a file system in a namespace of its own")
    command = [unshare, "-rm", "sh", "-c", mount + 'exec "$2" -c "$3" "$1"', "sh", str(tmp_path), sys.executable]
    done = subprocess.run([*command, SMALL_DISK], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all held" in done.stdout


class SlowCommit(FolderStorage):
    """A folder on which rank 0 takes its time."""

    def commit(self, checkpoint: str, manifest: bytes) -> None:
        time.sleep(0.3)
        super().commit(checkpoint, manifest)


def _one_of_two(folder: Path) -> None:
    """What each of two ranks does: a good save, one that rank 1 cannot write, one again, and a rank that dies."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when the other rank has died
    ranks = Ranks.join("cpu", 60)
    slow = writer(SlowCommit(folder / "slow"), ranks)
    for step in (1, 2, 3):  # rank 1 comes to its next part while rank 0 commits and clears away
        slow.save(step, {"generator": fragments(5 * ranks.rank, 5 + 5 * ranks.rank)}, {}, {"config": {}})
    assert slow.finish() == (3, "")
    for checkpoint in list_checkpoints(folder / "slow"):
        checkpoint.verify()
    assert [c.step for c in list_checkpoints(folder / "slow")] == [1, 2, 3]
    slow.close()

    other = Gate(folder) if ranks.rank == 1 else FolderStorage(folder)
    if isinstance(other, Gate):
        other.open.set()
    to = writer(other, ranks, pauses_s=(0.0,))
    half = {"generator": fragments(5 * ranks.rank, 5 + 5 * ranks.rank)}

    def save_half(step: int) -> tuple[int | None, str]:
        to.save(step, half, {"statistics": {"loss": torch.tensor(1.0)}}, {"config": {}})
        for _ in range(20):  # collectives of the main threads, at the same time as those of the writers
            ranks.sum(torch.ones(1))
        return to.finish()

    assert save_half(1) == (1, "")
    if isinstance(other, Gate):
        other.failures = 2
    newest, error = save_half(2)
    assert newest == 1 and "rank 1 cannot write" in error, (newest, error)
    assert save_half(3) == (3, "")
    found = newest_valid(folder)
    assert found and found.step == 3
    assert found.section("generator").read("parameter", "layer.weight", 0, 10).tolist() == list(range(10))
    assert [c.step for c in list_checkpoints(folder)] == [1, 3]
    dist.barrier()
    if ranks.rank == 1:
        os._exit(9)  # in the place of its part
    to.save(4, half, {}, {"config": {}})
    to.close()
    assert [c.step for c in list_checkpoints(folder)] == [1, 3]
    (folder / "rank-0-went-on").touch()


@pytest.mark.slow
@pytest.mark.multirank
def test_ranks_commit_together_and_a_rank_that_dies_leaves_the_last_checkpoint(tmp_path):
    done = run_ranks(2, [__file__, str(tmp_path)], timeout_s=120)
    assert (tmp_path / "rank-0-went-on").exists(), done.stderr[-3000:]
    assert "checkpoint of step 4 was not saved" in done.stderr
    found = newest_valid(tmp_path)
    assert found
    assert found.step == 3


if __name__ == "__main__":
    _one_of_two(Path(sys.argv[1]))
