"""The time sheet and its event log: phases add up, and no end of a process and no disk spoils the log or the run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.launch import environment
from trainer.timing.event_log import events_file, read_events
from trainer.timing.time_sheet import TimeSheet

WRITER = """
import sys, time
from pathlib import Path
from trainer.timing.time_sheet import TimeSheet
sheet = TimeSheet(Path(sys.argv[1]), recorded=("checkpoint",), warms_up=True)
for step in range(1, 4):
    sheet.enter("g")
    sheet.end_step(step)
sheet.enter("checkpoint")
time.sleep(60)
"""


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def wait_for(file: Path, kind: str) -> None:
    until = time.monotonic() + 30
    while not any(event.kind == kind for event in read_events(file)):
        assert time.monotonic() < until, read_events(file)
        time.sleep(0.02)


def test_seconds_of_all_phases_add_up_to_the_time_since_the_process_began(tmp_path: Path) -> None:
    file, clock = events_file(tmp_path, "rank-0"), Clock()
    sheet = TimeSheet(
        file, since=95.0, recorded=("checkpoint", "start"), warms_up=True, clock=clock, wall_clock=clock, world_size=2
    )
    for phase, seconds, step in (("g", 3, 1), ("data", 1, None), ("g", 2, 2), ("checkpoint", 4, None)):
        sheet.enter(phase)
        clock.now += seconds
        if step:
            sheet.end_step(step)
    sheet.close(status="FINISHED")
    start, checkpoint, end = read_events(file)
    assert (start.kind, start.fields["seconds"], start.fields["world_size"]) == ("start", {"start": 5.0}, 2)
    assert checkpoint.fields["seconds"] == {"start": 8.0, "g": 2.0, "data": 1.0, "checkpoint": 0.0}  # step 1 warms up
    assert checkpoint.fields["step"] == 2
    assert end.fields["seconds"] == {"start": 8.0, "g": 2.0, "data": 1.0, "checkpoint": 4.0}
    assert sum(end.fields["seconds"].values()) == end.at - 95.0


def test_going_back_to_a_checkpoint_is_a_start_until_the_next_step_is_done(tmp_path: Path) -> None:
    file, clock = tmp_path / "log.jsonl", Clock()
    sheet = TimeSheet(file, warms_up=True, clock=clock, wall_clock=clock)
    sheet.resume(0)
    for phase, step in (("g", 1), ("g", 2), ("start", None), ("g", 1)):
        sheet.enter(phase)
        clock.now += 1
        if phase == "start":
            sheet.resume(0)
        if step:
            sheet.end_step(step)
    sheet.close(status="FINISHED")
    last = read_events(file)[-1]
    assert last.fields["seconds"] == {"start": 3.0, "g": 1.0}
    assert last.fields["step"] == 1


def test_a_killed_process_leaves_its_last_phase_and_the_next_one_appends_after_a_torn_line(tmp_path: Path) -> None:
    file = events_file(tmp_path, "rank-0")
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(file)], env=environment())
    wait_for(file, "phase")
    wait_for(file, "standing")  # a process that does nothing still says that it lives
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = read_events(file)
    assert killed[-1].fields["phase"] == "checkpoint"
    assert killed[-1].fields["step"] == 3
    with file.open("ab") as torn:
        torn.write(b'{"kind": "standing", "at": 17')
    TimeSheet(file).close(status="FINISHED")
    events = read_events(file)
    assert events[: len(killed)] == killed
    assert [event.kind for event in events[len(killed) :]] == ["start", "end"]
    assert events[-1].start != killed[-1].start


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    right = b'{"kind": "end", "at": 5, "start": "a", "step": 3}\n'
    wrong = (
        b"\x00\xff\n",
        b"[]\n",
        b'{"kind": 1, "at": 5, "start": "a"}\n',
        b'{"kind": "x", "at": NaN, "start": "a"}\n',
    )
    file.write_bytes(b"".join(wrong) + right + b"[" * 10_000 + b"\n" + right[:20])
    (event,) = read_events(file)
    assert (event.kind, event.at, event.fields) == ("end", 5.0, {"step": 3})
    assert read_events(tmp_path / "missing.jsonl") == []


def test_a_disk_that_takes_nothing_is_told_once_and_ends_nothing(tmp_path: Path, caplog) -> None:
    (tmp_path / "events").write_text("a file where the folder should be")
    sheet = TimeSheet(events_file(tmp_path, "rank-0"))
    for step in range(3):
        sheet.resume(step)
    sheet.close(status="FINISHED")
    assert [record.message for record in caplog.records if "times are not recorded, the run goes on" in record.message]
    assert len(caplog.records) == 1


def test_the_log_grows_with_the_logarithm_of_the_time_and_then_by_a_line_per_half_minute(tmp_path: Path) -> None:
    clock = Clock()
    sheet = TimeSheet(tmp_path / "log.jsonl", clock=clock)
    pauses = {}
    for hours in (0, 1, 10, 1000):
        clock.now = 100.0 + 3600 * hours
        pauses[hours] = sheet._pause_s()
    sheet.close()
    assert pauses == {0: 1.0, 1: 3.6, 10: 30.0, 1000: 30.0}
