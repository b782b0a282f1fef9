"""A measurement in a process of its own: its result, or in one line why there is none."""

import signal
from pathlib import Path

import pytest

from tests.front_door import wait_for
from trainer.bench.trial import Ended, read_outcome, run_process

TRACEBACK = "Traceback (most recent call last):\n  File x\n{}\n[W1] a warning from the end of the process\n"


@pytest.mark.parametrize(
    ("code", "log", "failure", "out_of_memory"),
    [
        (1, TRACEBACK.format("torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB"), "out of memory", True),
        (1, TRACEBACK.format("RuntimeError: [enforce fail] can't allocate memory"), "out of memory", True),
        (1, "exitcode: -9, Signal 9 (SIGKILL) received by PID 7", "out of memory", True),
        (-9, "", "out of memory", True),
        (1, TRACEBACK.format("ValueError: no such thing"), "ValueError: no such thing", False),
        (2, "training.batch is unknown\n", "training.batch is unknown", False),
        (-11, "some words", "ended by SIGSEGV: some words", False),
        (None, "", "no result in 7 s", False),
        (0, "", "exit code 0, and no message", False),
    ],
)
def test_reason_is_one_line(code, log, failure, out_of_memory):
    outcome = read_outcome(Ended(code, "", 7.0), log)
    assert (outcome.report, outcome.failure, outcome.out_of_memory) == (None, failure, out_of_memory)


def test_result_is_the_object_that_was_printed_after_other_lines():
    assert read_outcome(Ended(0, 'notes\n{"images_per_s": 2.5}\n', 1.0), "").report == {"images_per_s": 2.5}


def is_dead(pid: str) -> bool:
    """Whether at most its new parent still knows the process."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_process_that_hangs_is_killed_with_its_children(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text(
        "import os, signal, time\n"
        "child = os.fork()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if child: open('child', 'w').write(str(child))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.bench.trial._GRACE_S", 0.1)
    ended = run_process(["hangs"], 2.0, tmp_path / "log")
    assert ended.code is None
    child = Path("child")
    if child.exists():  # on a busy machine, it may have been killed before it wrote that
        wait_for(lambda: is_dead(child.read_text()))


def test_stderr_is_kept_in_the_log(tmp_path, monkeypatch):
    (tmp_path / "speaks.py").write_text("import sys\nprint('{}')\nprint('words', file=sys.stderr)\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    ended = run_process(["speaks"], 60.0, tmp_path / "log")
    assert (ended.code, ended.printed, (tmp_path / "log").read_text()) == (3, "{}\n", "words\n")
    assert signal.getsignal(signal.SIGINT) is before
