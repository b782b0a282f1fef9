"""Two runs never write to one directory: who lives is waited for, who is dead is not."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.launch import environment
from tests.trainer.runs import configure
from trainer.checkpoint import lease as module
from trainer.checkpoint.lease import Holder, LeaseError, acquire, is_alive, launch_id, this_process
from trainer.checkpoint.lease_places import LEASE, FolderLease, claim, claim_folder


@pytest.fixture
def place(tmp_path) -> FolderLease:
    return FolderLease(tmp_path)


@pytest.fixture
def elsewhere() -> Holder:
    """A holder whose process cannot be looked at from here."""
    return Holder("their launch", "anotherboot 17 4711", "token", "node7", 17, "2026-11-24T05:00:00Z")


class Clock:
    """Time that passes when it is looked at."""

    def __init__(self, step_s: float) -> None:
        self.now, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module, "_POLL_S", 0.0)


def parent_process() -> Holder:
    """A holder that lives on this host and is none of ours."""
    started = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
    process = f"{this_process().split()[0]} {os.getppid()} {started}"
    return Holder(this_process(), process, "t", "here", os.getppid(), "")


def another_process(code: str, *arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(line, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


HOLD = """
import sys
from pathlib import Path
from trainer.checkpoint.lease import acquire
from trainer.checkpoint.lease_places import FolderLease
acquire(FolderLease(Path(sys.argv[1])), sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_live_run_is_not_disturbed_and_a_killed_one_is_taken_over_at_once(place, tmp_path):
    holder = another_process(HOLD, tmp_path, "their launch")
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(LeaseError) as refused:
            acquire(place, "ours")
        message = str(refused.value)
        assert f"{tmp_path} is in use by another run: process {holder.pid} on " in message
        assert "since 20" in message and "run.directory" in message
        acquire(place, "their launch").release()  # the same launch, started again
    finally:
        holder.kill()
        holder.wait()
    dead = Holder("their launch", f"{this_process().split()[0]} {holder.pid} 1", "t", "here", holder.pid, "")
    assert place.swap(place.read(), dead.encode())
    began = time.monotonic()
    acquire(place, "ours").release()
    assert time.monotonic() - began < module.STALE_S / 2
    assert not (tmp_path / LEASE).exists()


def test_holder_elsewhere_that_stands_still_is_given_time_and_then_taken_over(place, elsewhere):
    assert place.swap(None, elsewhere.encode())
    clock = Clock(1.0)
    lease = acquire(place, "ours", clock=clock)
    assert clock.now > module.STALE_S
    lease.check()
    lease.release()


def test_holder_elsewhere_whose_heartbeat_moves_is_alive_whatever_its_clock_says(place, elsewhere):
    assert place.swap(None, elsewhere.encode())

    class Beating(Clock):
        def __call__(self) -> float:
            if self.now == 5.0:
                assert place.beat(elsewhere.encode(), replace(elsewhere, beat=1).encode())
            return super().__call__()

    clock = Beating(1.0)
    with pytest.raises(LeaseError, match="process 17 on node7, since 2026-11-24T05:00:00Z"):
        acquire(place, "ours", clock=clock)
    assert clock.now < 10


def test_damaged_lease_is_given_time_too(place, tmp_path):
    (tmp_path / LEASE).write_text("{")
    clock = Clock(1.0)
    acquire(place, "ours", clock=clock).release()
    assert clock.now > module.STALE_S


def test_orphan_of_a_driver_that_is_gone_is_waited_for(place):
    """Ray's workers live on for some seconds after their driver was killed."""
    machine = this_process().split()[0]
    child = another_process("import sys; sys.stdin.read()")
    assert child.stdin
    started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    orphan = Holder(f"{machine} {2**22 + 1} 1", f"{machine} {child.pid} {started}", "t", "here", child.pid, "")
    assert is_alive(orphan.process) is True
    assert is_alive(orphan.launch) is False
    assert place.swap(None, orphan.encode())
    held: list[module.Lease] = []
    waiting = threading.Thread(target=lambda: held.append(acquire(place, "ours")))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    child.stdin.close()
    child.wait(60)
    waiting.join(60)
    held[0].release()


def test_heartbeat_moves_the_lease_and_release_removes_it(place, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    lease = acquire(place, "ours")
    deadline = time.monotonic() + 30
    while (holder := Holder.decode((tmp_path / LEASE).read_bytes())) is None or holder.beat < 3:
        assert time.monotonic() < deadline
    lease.check()
    lease.release()
    lease.release()
    assert not (tmp_path / LEASE).exists()
    with pytest.raises(LeaseError, match="has been given back"):
        lease.check()


def test_who_lost_the_lease_notices_before_it_commits_and_leaves_the_new_one_alone(place, elsewhere, caplog):
    lease = acquire(place, "ours")
    assert place.swap(place.read(), elsewhere.encode())
    with pytest.raises(LeaseError, match=r"another run took it over \(process 17 on node7"):
        lease.check()
    lease.release()
    assert place.read() == elsewhere.encode()
    assert "took it over" in caplog.text


def test_late_heartbeat_does_not_reach_the_file_of_the_next_holder(place, elsewhere):
    lease = Holder.here("ours").encode()
    assert place.swap(None, lease)
    assert place.swap(lease, elsewhere.encode())
    assert not place.beat(lease, lease)
    assert not place.swap(lease, lease)
    assert place.read() == elsewhere.encode()


def test_holder_that_stood_still_does_not_come_back_after_the_run_that_took_over_has_ended(place, tmp_path):
    lease = acquire(place, "ours")
    content = place.read()
    (tmp_path / LEASE).unlink()  # as by a run that came and went meanwhile
    with pytest.raises(LeaseError, match="it was removed, perhaps by another run; this run writes no more"):
        lease.check()
    assert content and not place.beat(content, content)
    lease.release()
    assert not (tmp_path / LEASE).exists()


def test_folder_that_a_lease_made_goes_with_it_unless_something_lies_there(tmp_path):
    for name in ("empty", "used"):
        lease = acquire(FolderLease(tmp_path / name), "ours")
        if name == "used":
            (tmp_path / name / "step-00000001").mkdir()
        lease.release()
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_runs_that_reach_the_same_checkpoints_by_other_names_keep_each_other_out(tiny, tmp_path):
    held = claim(configure(tiny, tmp_path / "one"), "ours")
    held.check()
    assert (tmp_path / "one" / LEASE).exists() and (tmp_path / "one" / "checkpoints" / LEASE).exists()
    held.release()
    checkpoints = tmp_path / "one" / "checkpoints"
    assert not checkpoints.exists()
    assert FolderLease(checkpoints).swap(None, parent_process().encode())
    another = configure(tiny, tmp_path / "two", f"checkpoint.directory={checkpoints}")
    for attempt in (lambda: claim(another, "ours"), lambda: claim_folder(str(checkpoints), "ours")):
        with pytest.raises(LeaseError, match=f"{checkpoints} is in use"):
            attempt()
    assert not (tmp_path / "two" / LEASE).exists()


def test_processes_are_told_apart():
    assert is_alive(this_process()) is True
    machine, pid, started = this_process().split()
    assert is_alive(f"{machine} {pid} {int(started) + 1}") is False  # its number was given to another one
    assert is_alive(f"{machine}x {pid} {started}") is None
    assert is_alive("their launch") is None


def test_launch_is_the_drivers_or_torchruns_or_this_process(monkeypatch):
    monkeypatch.delenv(module.LAUNCH_VARIABLE, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch_id() == this_process()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    assert launch_id() == "torchrun abc"
    monkeypatch.setenv(module.LAUNCH_VARIABLE, "driver")
    assert launch_id() == "driver"


def test_run_with_checkpoints_elsewhere_holds_both_places_or_none(tiny, tmp_path, elsewhere):
    run, shared = tmp_path / "run", tmp_path / "shared"
    config = configure(tiny, run, f"checkpoint.directory={shared}")
    held = claim(config, "ours")
    held.check()
    assert (run / LEASE).exists() and (shared / LEASE).exists()
    held.release()
    assert FolderLease(shared).swap(None, parent_process().encode())
    with pytest.raises(LeaseError, match=f"{shared} is in use"):
        claim(config, "ours")
    assert not (run / LEASE).exists()


def test_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LeaseError, match="cannot keep a lease there"):
        claim_folder(str(tmp_path / "file" / "x"), "ours")


@pytest.mark.parametrize(
    "content",
    [
        b'{"launch":1,"process":2,"token":3,"host":4,"pid":5,"since":6,"beat":7}',
        b'{"launch":"1","process":"2","token":"3","host":"4","pid":"5","since":"6","beat":7}',
        b"[]",
        b"\xff",
        b"[" * 100_000,
    ],
    ids=lambda content: content[:40],
)
def test_lease_of_the_wrong_form_names_no_holder(content):
    assert Holder.decode(content) is None
