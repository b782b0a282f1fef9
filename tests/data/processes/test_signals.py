"""Which signals ask for a stop, which of them count twice, and what is written to a terminal that is gone."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from data.processes.signals import SAME_REQUEST_S, STOP_SIGNALS, StopRequest, handle_stop_signals
from tests.launch import ROOT, default_signals, environment


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    """The handlers of the tests' own process."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_of_one_moment_are_one_request():
    now = [0.0]
    request = StopRequest(clock=lambda: now[0])
    assert not request.asked
    assert not request.note()
    assert request.asked
    now[0] = SAME_REQUEST_S
    assert not request.note(), "torchrun passes on what the terminal has sent already"
    now[0] += 0.1
    assert request.note()


def test_a_closed_terminal_is_a_request_unless_nohup_says_otherwise():
    received = []
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    handle_stop_signals(lambda number, _frame: received.append(number))
    os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    handle_stop_signals(lambda number, _frame: received.append(number))
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)
    assert received == [signal.SIGHUP, signal.SIGTERM, signal.SIGINT]


WRITING = """
import sys, time
from data.processes.signals import StopRequest, handle_stop_signals

request = StopRequest()
handle_stop_signals(lambda number, _frame: request.note())
print("ready", flush=True)
while not request.asked:
    time.sleep(0.01)
print("nobody reads this", flush=True)
print("nor this", file=sys.stderr, flush=True)
"""


def test_output_after_the_terminal_is_gone_is_discarded():
    terminal, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING],
        cwd=ROOT,
        env=environment(),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=default_signals,
    )
    os.close(slave)
    try:
        said = b""
        while not said.endswith(b"ready\r\n"):  # Python may write the end of the line on its own
            said += os.read(terminal, 100)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)  # the terminal is not the one of its session
        assert process.wait(30) == 0
    finally:
        process.kill()
