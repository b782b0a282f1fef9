"""Ports that two jobs of one machine never share, and that the kernel gives to nobody."""

import socket
import subprocess
import sys

import pytest

from cluster.slurm import ports
from cluster.slurm.ports import candidates, reserve_ports
from tests.launch import ROOT

HOLDER = """
from cluster.slurm.ports import reserve_ports

print(*reserve_ports("127.0.0.1", 200), flush=True)
input()
"""


def test_another_process_gets_other_ports_while_the_first_one_lives(monkeypatch):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        theirs = [int(port) for port in other.stdout.readline().split()]
        assert len(set(theirs)) == 200
        monkeypatch.setattr(ports, "candidates", lambda: (theirs[0], theirs[0]))
        with pytest.raises(OSError, match="fewer than 1 ports"):
            reserve_ports("127.0.0.1", 1)
        other.communicate("\n")
    assert reserve_ports("127.0.0.1", 1) == [theirs[0]]


def test_ports_lie_outside_of_the_range_that_connections_take_theirs_from():
    with socket.create_server(("127.0.0.1", 0)) as given:
        (port,) = reserve_ports("127.0.0.1", 1)
        first, last = candidates()
        assert first <= port <= last
        assert not first <= given.getsockname()[1] <= last


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [("32768\t60999", (20_000, 32_767)), ("20000 40000", (40_001, 65_535)), ("1024 65535", (20_000, 65_535))],
)
def test_candidates_are_the_larger_part_that_the_kernel_leaves(tmp_path, monkeypatch, kernels, expected):
    (tmp_path / "range").write_text(kernels)
    monkeypatch.setattr(ports, "_RANGE", tmp_path / "range")
    assert candidates() == expected


def test_a_port_on_which_something_listens_is_not_given(monkeypatch):
    (port,) = reserve_ports("127.0.0.1", 1)
    ports._held.pop().close()
    monkeypatch.setattr(ports, "candidates", lambda: (port, port))
    with socket.create_server(("127.0.0.1", port)), pytest.raises(OSError, match="fewer than 1 ports"):
        reserve_ports("127.0.0.1", 1)
    assert reserve_ports("127.0.0.1", 1) == [port]
