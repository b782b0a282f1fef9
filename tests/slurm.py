"""A real Slurm with two nodes on this machine, with its own daemons, ports, key and folders."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
"""The programs that are started, and the Debian package of each."""
NODES = ("n1", "n2")

CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
KillWait=30
MinJobAge=3600
MessageTimeout=30
SlurmdTimeout=300
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=60 State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """The data that a client of the cluster needs."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, timeout_s: float = 60) -> str:
        """Run a Slurm command; returns its output."""
        done = subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True, timeout=timeout_s)
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Slurm's description of a job, by field."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for(self, number: str, condition: Callable[[dict[str, str]], bool], timeout_s: float) -> dict[str, str]:
        """Wait until Slurm's description of a job satisfies `condition`."""
        deadline = time.monotonic() + timeout_s
        while not condition(job := self.job(number)):
            assert time.monotonic() < deadline, job
            time.sleep(0.3)
        return job

    def wait_for_end(self, number: str, timeout_s: float) -> dict[str, str]:
        return self.wait_for(number, lambda job: job["JobState"] in ENDED, timeout_s)

    def cancel_all(self) -> None:
        """Cancel all jobs and wait until none is left; a job's processes end with it."""
        subprocess.run(["scancel", "--user=root"], env=os.environ | self.env, capture_output=True, timeout=60)
        deadline = time.monotonic() + 60
        while self.run("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.3)


ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY"}


def missing() -> str | None:
    """Why Slurm cannot be started, or None."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root"
    absent = sorted({package for program, package in PROGRAMS.items() if not which(program)})
    return f"Debian's {' and '.join(absent)} is not installed (.ci/run installs it)" if absent else None


def which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")


@contextmanager
def slurm(folder: Path, *, cpus: int = 2) -> Iterator[Slurm]:
    """Start the daemons; afterwards all their processes are ended."""
    if reason := missing():
        pytest.skip(reason)
    ports = free_ports(1 + len(NODES))
    here = f"NodeHostname=localhost NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN"
    nodes = "\n".join(f"NodeName={name} Port={port} {here}" for name, port in zip(NODES, ports[1:], strict=True))
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    config = folder / "slurm.conf"
    config.write_text(CONF.format(folder=folder, ctld_port=ports[0], nodes=nodes))
    found = Slurm(folder)
    with ExitStack() as stack:
        start_munge(folder / "munge", stack)
        stack.enter_context(daemon(["slurmctld", "-D", "-f", str(config)], folder, "slurmctld", found.env))
        for node in NODES:
            command = ["slurmd", "-D", "-N", node, "-f", str(config)]
            stack.enter_context(daemon(command, folder, f"slurmd-{node}", found.env))
        wait_until_idle(found)
        try:
            yield found
        finally:
            found.cancel_all()


def start_munge(folder: Path, stack: ExitStack) -> None:
    """Start the daemon that signs messages between the others, with its own key; as root, like the others."""
    folder.mkdir(mode=0o700)
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    options = {"key-file": key, "socket": folder / "socket", "pid-file": folder / "pid", "seed-file": folder / "seed"}
    command = ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in options.items())]
    stack.enter_context(daemon([*command, f"--log-file={folder / 'log'}"], folder.parent, "munged", {}))
    deadline = time.monotonic() + 20
    while not (folder / "socket").exists():
        assert time.monotonic() < deadline, (folder.parent / "munged.out").read_text()
        time.sleep(0.05)


@contextmanager
def daemon(command: list[str], folder: Path, name: str, env: dict[str, str]) -> Iterator[None]:
    command = [which(command[0]) or command[0], *command[1:]]
    with (folder / f"{name}.out").open("w") as output:
        process = subprocess.Popen(command, env=os.environ | env, stdout=output, stderr=output, start_new_session=True)
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_idle(found: Slurm, timeout_s: float = 60) -> None:
    """Wait until all nodes are idle."""
    deadline = time.monotonic() + timeout_s
    while True:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"],
            env=os.environ | found.env,
            capture_output=True,
            text=True,
        )
        if done.stdout.split() == ["idle"] * len(NODES):
            return
        log = (found.folder / "slurmctld.log").read_text()
        assert time.monotonic() < deadline, done.stdout + done.stderr + log[-3000:]
        time.sleep(0.2)


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [s.getsockname()[1] for s in sockets]
