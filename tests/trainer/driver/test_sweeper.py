"""What is left of a Ray after its driver was killed, and what is left alone."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from trainer.driver import sweeper

MARK = f"{sweeper.VARIABLE}=0123"


@pytest.fixture
def sleeping() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Processes with the mark, with another mark, and with the mark in another session."""

    def start(value: str, session: bool = False) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["sleep", "600"], env={**os.environ, sweeper.VARIABLE: value}, start_new_session=session
        )

    found = {"of Ray": start("0123"), "of another Ray": start("01234"), "moved": start("0123", session=True)}
    yield found
    for process in found.values():
        process.kill()
        process.wait()


def test_only_processes_of_this_ray_and_this_session_are_killed(sleeping, monkeypatch):
    assert sweeper.processes(MARK) == [sleeping["of Ray"].pid]
    monkeypatch.setattr(sweeper, "GRACE_S", 0.0)
    sweeper.sweep(MARK)
    assert sleeping["of Ray"].wait(30) < 0
    assert sleeping["of another Ray"].poll() is None and sleeping["moved"].poll() is None


def test_it_waits_for_the_end_of_its_input(sleeping):
    sleeping["of Ray"].kill()
    sleeping["of Ray"].wait()
    command = [sys.executable, "-I", "-S", sweeper.__file__, MARK]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.communicate()
    assert process.returncode == 0
