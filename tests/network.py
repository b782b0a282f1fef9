"""Two hosts on one machine: network namespaces with an address each, joined by a link that can be degraded.

The link is two TUN devices and a thread that forwards packets between them, and can delay or drop them. The kernel's
own module for delay and loss (netem) is missing on many machines.
"""

import fcntl
import os
import queue
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

INTERFACE = "wire0"
"""Name of the interface to the other host, in each namespace."""
MTU = 9000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


@dataclass(frozen=True)
class Host:
    """One of the two hosts.

    Attributes:
        name: its namespace.
        address: its address on the link.
    """

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """A command line that runs on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def run(self, *words: str) -> str:
        return subprocess.run(self.command(*words), check=True, capture_output=True, text=True).stdout

    def end_processes(self) -> None:
        """Kill all processes on this host."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        if pids:
            subprocess.run(["kill", "-KILL", *pids], capture_output=True)


class Link:
    """Forwards packets between two devices. Its settings may be changed at any time.

    Attributes:
        is_cut: drop everything, without errors.
        delay_s: one-way delay of each packet.
        loss: share of the packets that are dropped.
        carried, lost: number of packets so far.
    """

    def __init__(self, devices: tuple[int, int]) -> None:
        self.is_cut, self.delay_s, self.loss = False, 0.0, 0.0
        self.carried = self.lost = 0
        self._dice = random.Random(0)
        self._ended = threading.Event()
        self._threads = []
        for source, target in (devices, devices[::-1]):
            under_way: queue.Queue[tuple[float, bytes]] = queue.Queue()
            for work in (self._take, self._deliver):
                thread = threading.Thread(
                    target=work, args=(source if work == self._take else target, under_way), daemon=True
                )
                thread.start()
                self._threads.append(thread)

    def _take(self, device: int, under_way: "queue.Queue[tuple[float, bytes]]") -> None:
        while not self._ended.is_set():
            if not select.select([device], [], [], 0.2)[0]:
                continue
            packet = os.read(device, MTU + 100)
            if self.is_cut or (self.loss and self._dice.random() < self.loss):
                self.lost += 1
            else:
                under_way.put((time.monotonic() + self.delay_s, packet))

    def _deliver(self, device: int, under_way: "queue.Queue[tuple[float, bytes]]") -> None:
        while not self._ended.is_set():
            try:
                due, packet = under_way.get(timeout=0.2)
            except queue.Empty:
                continue
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            try:
                os.write(device, packet)
                self.carried += 1
            except OSError:  # the device is down
                self.lost += 1

    def end(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


@dataclass(frozen=True)
class Network:
    """The two hosts and their link."""

    link: Link
    hosts: tuple[Host, Host]


def missing() -> str | None:
    """Why namespaces cannot be created, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "Debian's iproute2 is not installed (.ci/run installs it)"
    if not Path("/dev/net/tun").exists():
        return "this machine has no /dev/net/tun"
    name = f"ddgan-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"no network namespace can be made here: {tried.stderr.strip()}"
    ip("netns", "del", name)
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[Network]:
    """Create the hosts; afterwards remove them and kill their processes."""
    if reason := missing():
        pytest.skip(reason)
    number = os.getpid() % 1_000_000
    with ExitStack() as stack:
        hosts, devices = [], []
        for i in (1, 2):
            host = Host(f"ddgan{number}-{i}", f"10.199.0.{i}")
            ip("netns", "add", host.name)
            stack.callback(ip, "netns", "del", host.name)
            stack.callback(host.end_processes)
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, device)
            name = f"ddt{number}-{i}"
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22s", name.encode(), _IFF_TUN | _IFF_NO_PI, b""))
            ip("link", "set", name, "netns", host.name)
            host.run("ip", "link", "set", name, "name", INTERFACE, "mtu", str(MTU))
            host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                host.run("ip", "link", "set", "dev", interface, "up")
            hosts.append(host)
            devices.append(device)
        link = Link((devices[0], devices[1]))
        stack.callback(link.end)
        yield Network(link, (hosts[0], hosts[1]))
