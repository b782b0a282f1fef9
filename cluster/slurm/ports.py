"""Ports for the servers of one job, which no other job on the same machine is given while this one lives."""

import random
import socket
from contextlib import suppress
from pathlib import Path

_LOWEST = 20_000
"""Below are the ports of well-known servers, and from 10,002 on those that Ray gives to its workers."""
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_held: list[socket.socket] = []


def reserve_ports(address: str, number: int) -> list[int]:
    """Ports on which nothing listens, held by this process until it ends.

    The kernel gives ports of its own range to every outgoing connection, and to servers that leave the choice to it. A
    port that was free there may be taken before Ray has started, and another program then answers in Ray's place. So
    these lie outside of that range, and processes that reserve ports this way exclude each other.

    Args:
        address: IPv4 address of the servers.
        number: how many.

    Raises:
        OSError: there are not as many.
    """
    first, last = candidates()
    found: list[int] = []
    for port in random.sample(range(first, last + 1), last + 1 - first):
        if _reserve(address, port):
            found.append(port)
        if len(found) == number:
            return found
    raise OSError(f"fewer than {number} ports of {address} are free between {first} and {last}")


def candidates() -> tuple[int, int]:
    """The first and the last port that the kernel gives to nobody: the larger part outside of its own range."""
    low, high = map(int, _RANGE.read_text().split())
    below, above = (_LOWEST, low - 1), (high + 1, 65_535)
    larger = max(below, above, key=lambda part: part[1] - part[0])
    return larger if larger[1] - larger[0] > 1000 else (_LOWEST, 65_535)


def _reserve(address: str, port: int) -> bool:
    # An abstract name belongs to the network namespace, as ports do, and vanishes with the process that holds it.
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with suppress(OSError):
        held.bind(f"\0ddgan-port-{port}")
        with socket.create_server((address, port)):
            _held.append(held)
            return True
    held.close()
    return False
