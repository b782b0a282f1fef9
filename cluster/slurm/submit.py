"""Makes a Slurm job from a request, for `./launch.sh slurm`; submits it, follows it and stops it."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.commands import ToolError, run_tool, show_tool
from cluster.record import Record, last_of
from cluster.request import ROOT, Request
from trainer.rank.run_folder import make_run_directory

SCRIPT = "cluster/slurm/job.sbatch"
_SECRETS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
"""They may belong to another cluster, and Slurm would pass them on to the job."""


@dataclass(frozen=True)
class Wishes:
    """The user's options for Slurm.

    Attributes:
        partition, account, qos, time: options of sbatch; None: the cluster's default.
        seeds: job array, such as 0-4, with one run per seed.
        grace_s: seconds before the time limit at which the run is asked to save.
        max_requeues: how often the job may requeue itself; None: the script's default.
        modules, container, interface: settings of the script; None: its default.
        more: further options of sbatch.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    seeds: str | None = None
    grace_s: int = 180
    max_requeues: int | None = None
    modules: str | None = None
    container: str | None = None
    interface: str | None = None
    more: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """The script's settings, as environment variables."""
        found = {
            "DDGAN_MODULES": self.modules,
            "DDGAN_CONTAINER": self.container,
            "DDGAN_INTERFACE": self.interface,
            "DDGAN_MAX_REQUEUES": None if self.max_requeues is None else str(self.max_requeues),
        }
        return {name: value for name, value in found.items() if value}


def log_file(request: Request, wishes: Wishes) -> str:
    """The job's log file, with Slurm's placeholders."""
    return str(Path(request.config.run.directory) / f"slurm-{'%A_%a' if wishes.seeds else '%j'}.log")


def command(request: Request, wishes: Wishes) -> list[str]:
    """The command that submits the job."""
    options = {
        "job-name": request.name,
        "chdir": str(ROOT),
        "output": log_file(request, wishes),
        "nodes": str(request.nodes),
        "cpus-per-task": str(request.cpus_per_node),
        "gpus-per-node": str(request.gpus_per_node) if request.gpus_per_node else None,
        "signal": f"TERM@{wishes.grace_s}",
        "partition": wishes.partition,
        "account": wishes.account,
        "qos": wishes.qos,
        "time": wishes.time,
        "array": wishes.seeds,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value]
    return ["sbatch", "--parsable", *given, *wishes.more, SCRIPT, *request.arguments]


def submit(request: Request, wishes: Wishes) -> Record:
    """Submit the job to Slurm.

    Raises:
        ToolError: Slurm is missing or refuses, or the run is already queued or running.
        ConfigError: the run directory cannot be created.
    """
    before = last_of(request.name)
    if before and before.way == "slurm" and (state := _queue_state(before.job)):
        raise ToolError(
            f"{request.name} is in the queue as job {before.job} ({state}): stop it with ./launch.sh stop "
            f"{request.name}"
        )
    make_run_directory(request.config.run)  # Slurm does not create the log's folder
    env = {name: value for name, value in os.environ.items() if name not in _SECRETS} | wishes.environment
    printed = run_tool(command(request, wishes), env=env)
    job = printed.splitlines()[-1].partition(";")[0]
    return Record(request.name, "slurm", request.config.run.directory, job, log=log_file(request, wishes))


def status(record: Record) -> int:
    """Show the job's status: from the queue, then from scontrol while Slurm remembers the job, then from accounting."""
    if _queue_state(record.job):
        return show_tool(["squeue", "--jobs", record.job, "--format=%.14i %.9P %.9T %.10M %.9l %.6D %.10r %N"])
    try:
        shown = run_tool(["scontrol", "show", "job", record.job])
    except ToolError:
        return show_tool(["sacct", "--jobs", record.job, "--format=JobID,State,ExitCode,Elapsed,NodeList"])
    fields = dict(re.findall(r"(JobState|Reason|Restarts|ExitCode|StartTime|EndTime)=(\S+)", shown))
    print("  ".join(f"{name} {value}" for name, value in fields.items()))
    return 0


def logs(record: Record, follow: bool) -> int:
    """Show the job's output; for an array, that of all tasks."""
    pattern = Path(record.log.replace("%j", record.job).replace("%A", record.job).replace("%a", "*"))
    files = sorted(map(str, pattern.parent.glob(pattern.name)))
    if not files:
        raise ToolError(f"{pattern} does not exist yet: the job has not started; see ./launch.sh status {record.name}")
    return show_tool(["tail", "-n", "+1", *(["--follow=name"] if follow else []), *files])


def stop(record: Record) -> int:
    """Save and exit without requeue. A job that has not started is cancelled."""
    states = _queue_state(record.job)
    if not states:
        raise ToolError(f"job {record.job} is no longer in the queue")
    if "RUNNING" in states:
        show_tool(["scancel", "--signal=INT", "--state=RUNNING", record.job])
        print(f"job {record.job} saves a checkpoint and exits; follow it with ./launch.sh status {record.name}")
    if "PENDING" in states:
        return show_tool(["scancel", "--state=PENDING", record.job])
    return 0


def _queue_state(job: str) -> str:
    """States of a job in the queue; empty if it is not there."""
    try:
        states: Sequence[str] = run_tool(["squeue", "--noheader", "--jobs", job, "--format=%T"]).split()
    except ToolError as error:
        if "Invalid job id" in str(error):
            return ""
        raise
    return " ".join(sorted(set(states)))
