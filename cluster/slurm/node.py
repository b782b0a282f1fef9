"""The program of each task of a Slurm job: `srun python -m cluster.slurm.node ARGUMENTS-OF-TRAINER.RUN` in job.sbatch.

Every task starts a Ray node. The first task then checks the cluster, trains, and stops its node; the others stop theirs
when the first one's is gone. Slurm's SIGTERM reaches all tasks: the first saves and exits with 75, the others wait for
it. SIGINT, which `./launch.sh stop` sends, does the same but exits with 130, so that the job is not requeued.
"""

import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from cluster.request import job_config
from cluster.slurm.ray_node import Head, RayNode, RayStartError, answers, own_address, ray_environment
from data.processes.leaving import leave
from data.storage.errors import as_command
from data.storage.files import replaced
from trainer.config.command_line import start_logging
from trainer.run import STOPPED

log = logging.getLogger(__name__)

STOPPED_BY_USER = 128 + signal.SIGINT
JOIN_TIMEOUT_S = 300.0
_POLL_S = 2.0
_SILENCE_S = 120.0
_MAX_REJOINS = 20


class Stops:
    """Records the signals that arrived, even while trainer.run or Ray have installed their own handlers."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._read, write = socket.socketpair()
        self._read.setblocking(False)
        write.setblocking(False)
        self._write = write  # kept open
        signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    @property
    def seen(self) -> set[int]:
        """Numbers of the signals that have arrived."""
        with suppress(BlockingIOError):
            self._seen |= set(self._read.recv(1024))
        return self._seen & {signal.SIGTERM, signal.SIGINT}


def job_folder() -> Path:
    """The folder that the tasks of this start of the job share."""
    return Path(os.environ["DDGAN_JOB_FOLDER"])


@as_command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit codes are those of trainer.run; 130: stopped by its user."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    rank = int(os.environ["SLURM_PROCID"])
    start_logging(rank)
    stops = Stops()
    os.environ.pop("RAY_ADDRESS", None)  # it may come from the shell that submitted the job
    os.environ.pop("RAY_AUTH_TOKEN", None)
    try:
        if rank:
            return follow(stops)
        code = lead(with_seed(given, os.environ.get("SLURM_ARRAY_TASK_ID")), stops)
    except RayStartError:
        if not stops.seen:
            raise
        code = STOPPED if rank == 0 else 0  # Slurm signals all processes of a task, including `ray start`
    finally:
        if rank == 0:
            (job_folder() / "end").touch()
    return STOPPED_BY_USER if code == STOPPED and signal.SIGINT in stops.seen else code


def with_seed(arguments: list[str], task: str | None) -> list[str]:
    """In a job array, each task is a separate run; the task number is its seed and part of its run directory."""
    if task is None:
        return arguments
    directory = job_config(arguments).run.directory
    return [*arguments, "--set", f"run.seed={task}", "--set", f"run.directory={directory}/seed-{task}"]


def lead(arguments: list[str], stops: Stops) -> int:
    """The first task: head of the Ray cluster, preflight, training."""
    job_config(arguments)  # refuse wrong arguments before anything is started
    node = _node(towards=None)
    with node.head() as head:
        _publish(head)
        os.environ |= ray_environment(node.token, head.address) | head.environment
        os.environ["RAY_ADDRESS"] = f"{head.address}:{head.port}"
        from cluster import preflight  # only now, since Ray reads the environment when it is imported
        from trainer import run

        nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
        options = ["--nodes", str(nodes), "--join-timeout", f"{JOIN_TIMEOUT_S:g}"]
        try:
            code = preflight.main([*arguments, *options])
            if stops.seen:
                return STOPPED
            return code or run.main(arguments)
        except SystemExit:  # raised by Ray's own SIGTERM handler
            return STOPPED


def follow(stops: Stops) -> int:
    """Every other task: run a Ray node for as long as the first one's answers."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while (head := _published()) is None:
        if (job_folder() / "end").exists() or stops.seen:
            return 0
        if time.monotonic() > deadline:
            raise RayStartError(f"{socket.gethostname()}: the first task did not start Ray in {JOIN_TIMEOUT_S:.0f} s")
        time.sleep(_POLL_S)
    node = _node(towards=head.address)
    for _ in range(_MAX_REJOINS):
        with node.member(head) as processes:
            heard = time.monotonic()
            while processes.alive():
                time.sleep(_POLL_S)
                answer = answers(head)
                if answer is False or (job_folder() / "end").exists():
                    return 0
                heard = time.monotonic() if answer else heard
                if time.monotonic() - heard > _SILENCE_S:
                    log.warning("%s: the first node has not answered for %.0f s", socket.gethostname(), _SILENCE_S)
                    heard = time.monotonic()
        if answers(head) is False:
            return 0
        log.warning("%s: Ray dropped this node; joining again", socket.gethostname())
        time.sleep(5 * _POLL_S)
    raise RayStartError(f"{socket.gethostname()}: Ray dropped this node {_MAX_REJOINS} times")


def _node(towards: str | None) -> RayNode:
    cpus = int(os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE") or 1)
    visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    return RayNode(
        address=own_address(os.environ.get("DDGAN_INTERFACE", ""), towards),
        cpus=cpus,
        gpus=len(visible),
        token=job_folder() / "token",
        temporary=Path(os.environ.get("DDGAN_TMPDIR", "/tmp")),
    )


def _publish(head: Head) -> None:
    with replaced(job_folder() / "head.json") as draft:
        draft.write_text(json.dumps(asdict(head)))


def _published() -> Head | None:
    try:
        return Head(**json.loads((job_folder() / "head.json").read_text()))
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    leave(main())
