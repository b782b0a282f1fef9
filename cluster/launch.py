"""Start, follow and stop runs: called by `./launch.sh train|slurm|ray|kubernetes|status|logs|stop`.

Each launcher prints the exact command or manifest that it submits; with --dry-run it does nothing else. Arguments after
-- go to trainer.run. Repeating the command resumes a run that was stopped or failed. Exit codes: 0, done; 1, the
scheduler or the run failed; 2, the command or the config is wrong. `train` has the exit codes of trainer.run.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import preflight
from cluster.kubernetes import submit as kubernetes
from cluster.ray import submit as ray
from cluster.record import Record, find, known
from cluster.request import Request, job_config, make_request, name_of
from cluster.slurm import submit as slurm
from data.storage.arguments import whole_number
from data.storage.errors import UserError, as_command
from data.storage.paths import location_argument
from data.storage.redaction import redact
from trainer import run
from trainer.checkpoint.lease import Holder, is_alive
from trainer.checkpoint.lease_places import FolderLease
from trainer.checkpoint.storage import newest_seen, storage_of_run
from trainer.config.draft import ConfigError

WAYS = {"slurm": slurm, "ray": ray, "kubernetes": kubernetes}
LOCAL = "local"


@as_command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["train"]:
        return train([word for word in given[1:] if word != "--"])
    at = given.index("--") if "--" in given else len(given)
    ours, theirs = given[:at], given[at + 1 :]
    options = _parser().parse_args(ours)
    if theirs and options.command not in WAYS:
        raise UserError(f"{options.command} takes no arguments after --: remove {shlex.join(theirs)}")
    return options.call(options, theirs)


def train(arguments: list[str]) -> int:
    """Run preflight, then trainer.run: on this machine or, inside a Ray job, on its cluster."""
    options = run.parse_arguments(arguments)
    if not options.dry_run:
        print(f"preflight, then: {shlex.join(['python', '-m', 'trainer.run', *arguments])}", file=sys.stderr)
        if not run.inside_ray_job():  # status, logs and stop use the record of the last start
            directory = job_config(arguments).run.directory
            _record(
                Record(name_of(directory), LOCAL, directory, str(os.getpid())),
                f"status and stop take the run's directory, {directory}",
            )
        if code := preflight.main(arguments):
            return code
    return run.main(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="./launch.sh", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    def launcher(name: str, description: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
        added.add_argument("--config", required=True, help="name in trainer/configs, or a YAML file")
        added.add_argument("--dry-run", action="store_true", help="print what would be submitted, then exit")
        added.set_defaults(call={"slurm": _slurm, "ray": _ray, "kubernetes": _kubernetes}[name])
        return added

    by_slurm = launcher("slurm", "Submit a job with sbatch. docs/slurm.md")
    _add_nodes(by_slurm)
    for name in ("partition", "account", "qos", "time"):
        by_slurm.add_argument(f"--{name}", help="passed to sbatch")
    by_slurm.add_argument(
        "--seeds", metavar="0-4", help="submit a job array, with a run per seed in run.directory/seed-N"
    )
    by_slurm.add_argument(
        "--grace-s",
        type=whole_number(1),
        default=180,
        help="save so many seconds before the time limit (default: 180)",
    )
    by_slurm.add_argument("--max-requeues", type=whole_number(0), help="how often the job may restart (default: 20)")
    by_slurm.add_argument("--modules", help='environment modules to load, such as "python/3.11 cuda/12.4"')
    by_slurm.add_argument("--container", help="Apptainer image to run in")
    by_slurm.add_argument("--interface", help="network interface between the nodes, such as ib0")
    by_slurm.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option for sbatch: --sbatch=--exclusive",
    )

    by_ray = launcher("ray", "Submit a job to a Ray cluster. docs/ray.md")
    by_ray.add_argument("--address", required=True, help="address of its dashboard, such as http://127.0.0.1:8265")

    by_kubernetes = launcher("kubernetes", "Submit a RayJob with kubectl. docs/kubernetes.md")
    _add_nodes(by_kubernetes)
    by_kubernetes.add_argument("--image", required=True, help="container with the project and its packages")
    by_kubernetes.add_argument("--namespace", default="default", help="namespace (default: default)")
    by_kubernetes.add_argument("--claim", default="ddgan", help="volume claim mounted at /shared (default: ddgan)")
    by_kubernetes.add_argument("--secret", help="Secret whose keys become environment variables, such as those of S3")

    for name, call, description in (
        ("status", _status, "Show the status of a run."),
        ("logs", _logs, "Show the output of a run's driver."),
        ("stop", _stop, "Ask a run to write a checkpoint and exit."),
    ):
        of_run = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
        of_run.add_argument("run", type=location_argument, help="run directory, or the name that the launcher printed")
        of_run.set_defaults(call=call)
        if name == "logs":
            of_run.add_argument("-f", "--follow", action="store_true", help="keep printing new output")
    return parser


def _add_nodes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=whole_number(1), required=True, help="number of nodes")
    parser.add_argument("--gpus-per-node", type=whole_number(0), help="ranks per node, one GPU each; 0: train on CPUs")


# ---- launchers ----


def _slurm(options: argparse.Namespace, theirs: list[str]) -> int:
    request = make_request(
        options.config, theirs, nodes=options.nodes, gpus_per_node=options.gpus_per_node, elsewhere=False
    )
    wishes = slurm.Wishes(
        **{name: getattr(options, name) for name in ("partition", "account", "qos", "time", "seeds", "grace_s")},
        **{name: getattr(options, name) for name in ("max_requeues", "modules", "container", "interface")},
        more=tuple(options.sbatch),
    )
    settings = [f"{name}={shlex.quote(value)}" for name, value in wishes.environment.items()]
    _show(" ".join([*settings, shlex.join(slurm.command(request, wishes))]))
    return 0 if options.dry_run else _submitted(slurm.submit(request, wishes))


def _ray(options: argparse.Namespace, theirs: list[str]) -> int:
    request = make_request(options.config, theirs, nodes=None, gpus_per_node=None, elsewhere=True)
    line = ray.command(request, options.address)
    _show(shlex.join(line))
    if options.dry_run:
        return 0
    if ray.is_open(options.address):
        print(f"WARNING: {options.address} accepts jobs without a token: see docs/security.md", file=sys.stderr)
    return _submitted(ray.submit(request, options.address, line))


def _kubernetes(options: argparse.Namespace, theirs: list[str]) -> int:
    request: Request = make_request(
        options.config, theirs, nodes=options.nodes, gpus_per_node=options.gpus_per_node, elsewhere=True
    )
    documents = kubernetes.manifest(request, image=options.image, claim=options.claim, secret=options.secret)
    _show(documents.removesuffix("\n"))
    return 0 if options.dry_run else _submitted(kubernetes.submit(request, documents, options.namespace))


def _show(submitted: str) -> None:
    """Print what is submitted, without the secrets that its arguments may contain."""
    shown = redact(submitted)
    print(shown, flush=True)
    if shown != submitted:
        print("*** hides secrets: what is printed cannot be submitted by hand", file=sys.stderr)


def _submitted(record: Record) -> int:
    name = record.name
    print(f"submitted as job {record.job}; run {name}", file=sys.stderr)
    if _record(record, f"status, logs and stop do not know it: ask {record.way} itself for job {record.job}"):
        print(f"./launch.sh status {name}\n./launch.sh logs -f {name}\n./launch.sh stop {name}", file=sys.stderr)
    return 0


def _record(record: Record, otherwise: str) -> bool:
    """Note a start. Where that cannot be written, such as in an image, the run goes on; says what to do instead."""
    try:
        record.save()
    except OSError as error:
        print(f"this start is not recorded ({error.filename}: {error.strerror}); {otherwise}", file=sys.stderr)
        return False
    return True


# ---- existing runs ----


def _status(options: argparse.Namespace, _theirs: list[str]) -> int:
    record, directory = _find(options.run)
    if record:
        print(f"{record.name}: {record.way} job {record.job}, submitted {record.submitted}", flush=True)
    code = WAYS[record.way].status(record) if record and record.way != LOCAL else 0
    if (directory / "config.yaml").is_file():
        newest = newest_seen(storage_of_run(directory))
        print(f"{directory}: " + (f"checkpoint of step {newest.step}" if newest else "no checkpoint yet"))
        if holder := _holder(directory):
            alive = is_alive(holder.process)
            state = {True: "running", False: "ended", None: "last seen"}[alive]
            print(f"{state} as process {holder.pid} on {holder.host} since {holder.since}")
    elif not record:
        print(f"{directory} holds no run yet")
    return code


def _logs(options: argparse.Namespace, _theirs: list[str]) -> int:
    record, directory = _find(options.run)
    if record is None or record.way == LOCAL:
        raise ConfigError([f"{directory} was started by hand: look in the terminal where it was started"])
    return WAYS[record.way].logs(record, options.follow)


def _stop(options: argparse.Namespace, _theirs: list[str]) -> int:
    record, directory = _find(options.run)
    if record and record.way != LOCAL:
        return WAYS[record.way].stop(record)
    holder = _holder(directory)
    driver = int(holder.launch.split()[1]) if holder and is_alive(holder.launch) else None
    if driver is None:
        raise ConfigError([f"no process on this machine trains in {directory}: stop it on the machine where it runs"])
    os.kill(driver, signal.SIGTERM)
    print(f"process {driver} saves a checkpoint and exits")
    return 0


def _find(run_name: str) -> tuple[Record | None, Path]:
    """The record of the run's last submission, if there is one, and the run directory."""
    record = find(run_name)
    directory = Path(record.directory if record else run_name).absolute()
    if record is None and not directory.is_dir():
        raise ConfigError(
            [f"there is no run {run_name}: give its directory, or one of: {', '.join(known()) or 'none'}"]
        )
    return record, directory


def _holder(directory: Path) -> Holder | None:
    content = FolderLease(directory).read()
    return Holder.decode(content) if content else None


if __name__ == "__main__":
    sys.exit(main())
