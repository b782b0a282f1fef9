"""Check every node before training starts: `python -m cluster.preflight --config X`. Every launcher runs it first.

If RAY_ADDRESS is set, as in a Ray job, it checks all nodes of that cluster, otherwise this machine. It prints a table;
each failed line says what to do. Exit codes: 0, all checks passed; 2, a check failed, or the config is wrong.
"""

import argparse
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.node_checks import NodeReport, examine
from cluster.pair_check import all_reduce, rounds
from cluster.request import job_config
from data.processes.ray_environment import ray_folder, set_up_ray
from data.storage.arguments import whole_number
from data.storage.errors import UserError, as_command
from trainer.config.command_line import add_config_arguments, start_logging
from trainer.config.train_config import TrainConfig
from trainer.plan.preset import add_preset_arguments, preset_words
from trainer.rank.run_folder import make_run_directory

log = logging.getLogger(__name__)

CHECKS = ("shards", "run directory", "GPUs", "shared memory", "open files", "tracking")
CLOCK_TOLERANCE_S = 1.0
NODE_TIMEOUT_S = 120.0
PAIR_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        check: name of the check.
        passed: whether it passed; None: it does not apply.
        text: what was found; for a failure also on which node, and what to do.
    """

    check: str
    passed: bool | None
    text: str

    def __str__(self) -> str:
        verdict = {True: "ok", False: "FAILED", None: "-"}[self.passed]
        return f"{self.check:15} {verdict:7} {self.text}"


@as_command()
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m cluster.preflight", description=__doc__)
    add_config_arguments(parser)
    add_preset_arguments(parser)
    parser.add_argument("--init-from", help=argparse.SUPPRESS)  # accepts all arguments of trainer.run
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    parser.add_argument("--nodes", type=whole_number(1), help="number of nodes to wait for")
    parser.add_argument("--join-timeout", type=float, default=300.0, metavar="S", help="seconds to wait (default: 300)")
    options = parser.parse_args(arguments)
    start_logging(0)
    overrides = (word for text in options.set for word in ("--set", text))
    config = job_config(["--config", options.config, *overrides, *preset_words(options)])
    directory = Path(config.run.directory)
    is_new = not directory.exists()
    make_run_directory(config.run)
    if os.environ.get("RAY_ADDRESS"):
        lines = check_cluster(config, options.nodes, options.join_timeout)
    else:
        lines = check_machine(config)
    print("\n".join(map(str, lines)), flush=True)
    failed = sum(line.passed is False for line in lines)
    if failed:
        if is_new:
            with suppress(OSError):  # it may not be empty by now
                directory.rmdir()
        print(f"preflight: {failed} of {len(lines)} checks failed; nothing was started", file=sys.stderr)
    return 2 if failed else 0


def check_machine(config: TrainConfig) -> list[Line]:
    """Run all checks that need no cluster."""
    try:
        ray_folder()
    except UserError as error:
        return [Line("environment", False, str(error))]
    gpus = config.scaling.world_size if config.scaling.device == "gpu" else 0
    return summarize([examine(config, None, gpus)])


def summarize(reports: Sequence[NodeReport]) -> list[Line]:
    """The table's lines for the checks of each node, and for what must be equal on all nodes."""
    lines = [compare_versions(reports)]
    for check in CHECKS:
        failed = [f"{report.host}: {report.problems[check]}" for report in reports if check in report.problems]
        facts = {report.facts[check]: report.host for report in reports if check in report.facts}
        if failed:
            lines.append(Line(check, False, "; ".join(failed)))
        elif facts:
            lines.append(Line(check, True, "; ".join(facts)))
        else:
            lines.append(Line(check, None, "not asked for"))
    indexes = {report.facts["shards"]: report.host for report in reports if "shards" in report.facts}
    if len(indexes) > 1:
        where = "; ".join(f"{host} has {data}" for data, host in indexes.items())
        lines.append(Line("same data", False, f"{where}: copy the same data set to all nodes"))
    return lines


def compare_versions(reports: Sequence[NodeReport]) -> Line:
    """Python, the libraries and the project must be the same everywhere."""
    first = reports[0]
    wrong = [
        f"{report.host} has {name} {report.versions[name]}, {first.host} has {first.versions[name]}"
        for report in reports[1:]
        for name in first.versions
        if report.versions[name] != first.versions[name]
    ]
    if wrong:
        return Line("versions", False, "; ".join(wrong) + ": use the same environment and checkout on all nodes")
    return Line("versions", True, ", ".join(f"{name} {version}" for name, version in first.versions.items()))


def compare_clocks(offsets: dict[str, float]) -> Line:
    """Compare every node's clock with this one's."""
    wrong = [f"{host} is {offset:+.1f} s off" for host, offset in offsets.items() if abs(offset) > CLOCK_TOLERANCE_S]
    if wrong:
        return Line(
            "clocks", False, "; ".join(wrong) + ": start time synchronization there (chrony, systemd-timesyncd)"
        )
    return Line("clocks", True, f"within {max(map(abs, offsets.values())):.2f} s")


# ---- on a cluster ----


class NodeProbe:
    """An actor that runs the checks on one node."""

    def examine(self, config: TrainConfig, marker: str, gpus: int) -> NodeReport:
        """See `node_checks.examine`."""
        return examine(config, marker, gpus)

    def time(self) -> float:
        """The node's clock, in seconds."""
        return time.time()

    def free_port(self, address: str) -> int:
        """A port of this node on which nothing listens."""
        with socket.create_server((address, 0)) as probe:
            return probe.getsockname()[1]

    def all_reduce(self, rank: int, address: str, port: int, device: str) -> float:
        """See `pair_check.all_reduce`."""
        return all_reduce(rank, address, port, device=device, timeout_s=PAIR_TIMEOUT_S)


@dataclass(frozen=True)
class Probe:
    """A node of the cluster, and the actor on it.

    Attributes:
        host, address: name and address of the node; nodes on the same machine share both.
        gpus: number of GPUs that Ray offers there.
        actor: a `NodeProbe`.
    """

    host: str
    address: str
    gpus: int
    actor: Any


def check_cluster(config: TrainConfig, nodes: int | None, join_timeout_s: float) -> list[Line]:
    """Run all checks on all nodes of the cluster at RAY_ADDRESS."""
    try:
        set_up_ray()
    except UserError as error:
        return [Line("nodes", False, str(error))]
    import ray

    try:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        return [Line("nodes", False, f"Ray does not answer at {os.environ['RAY_ADDRESS']}: {error}")]
    try:
        joined = _await_nodes(nodes, join_timeout_s)
        if isinstance(joined, Line):
            return [joined]
        with _marker(Path(config.run.directory)) as marker:
            return [
                Line("nodes", True, f"{len(joined)}: {', '.join(sorted(probe.host for probe in joined))}"),
                *_check_probes(joined, config, marker),
            ]
    finally:
        ray.shutdown()


def _check_probes(probes: list[Probe], config: TrainConfig, marker: str) -> Iterator[Line]:
    import ray

    gpu = config.scaling.device == "gpu"
    asked = [(probe, probe.actor.examine.remote(config, marker, probe.gpus if gpu else 0)) for probe in probes]
    reports, failed = [], []
    for probe, answer in asked:
        try:
            reports.append(ray.get(answer, timeout=NODE_TIMEOUT_S))
        except Exception as error:
            failed.append(f"{probe.host} ({probe.address}): {_first_line(error)}")
    if failed:
        yield Line("answers", False, "; ".join(failed) + ": look at Ray's logs there, or exclude that node")
        return
    yield from summarize(reports)
    yield compare_clocks({_shown(probe): _clock_offset(probe, ray.get) for probe in probes})
    yield from _check_pairs(probes, "gpu" if gpu and all(probe.gpus for probe in probes) else "cpu")


def _clock_offset(probe: Probe, get: Callable[..., Any]) -> float:
    """Seconds by which the node's clock is ahead, from the fastest of three round trips."""
    tries = []
    for _ in range(3):
        before = time.time()
        there = get(probe.actor.time.remote(), timeout=NODE_TIMEOUT_S)
        after = time.time()
        tries.append((after - before, there - (before + after) / 2))
    return min(tries)[1]


def _check_pairs(probes: list[Probe], device: str) -> Iterator[Line]:
    import ray

    if len(probes) < 2:
        yield Line("all-reduce", None, "one node")
        return
    rates: dict[str, float] = {}
    failed = []
    for pairs in rounds(len(probes)):
        calls = {}
        for a, b in pairs:
            port = ray.get(probes[a].actor.free_port.remote(probes[a].address), timeout=NODE_TIMEOUT_S)
            calls[a, b] = [
                probes[node].actor.all_reduce.remote(rank, probes[a].address, port, device)
                for rank, node in enumerate((a, b))
            ]
        for (a, b), answers in calls.items():
            name = f"{_shown(probes[a])} - {_shown(probes[b])}"
            try:
                rates[name] = min(ray.get(answers, timeout=2 * PAIR_TIMEOUT_S + NODE_TIMEOUT_S))
            except Exception as error:
                failed.append(f"{name}: {_first_line(error)}")
    backend = "NCCL" if device == "gpu" else "gloo"
    if failed:
        advice = (
            ": check that no firewall blocks them and that the network interface is the right one "
            f"(GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME', '')}, "
            f"NCCL_SOCKET_IFNAME={os.environ.get('NCCL_SOCKET_IFNAME', '')})"
        )
        yield Line("all-reduce", False, "; ".join(failed) + advice)
        return
    slowest = min(rates, key=lambda name: rates[name])
    yield Line(
        "all-reduce",
        True,
        f"{len(rates)} pairs over {backend}, slowest {rates[slowest] / 1e9:.2f} GB/s ({slowest}), "
        f"fastest {max(rates.values()) / 1e9:.2f} GB/s",
    )
    for name, rate in rates.items() if len(rates) > 1 else ():
        yield Line("", None, f"{name}  {rate / 1e9:.2f} GB/s")


def _shown(probe: Probe) -> str:
    return f"{probe.host} ({probe.address})"


def _await_nodes(nodes: int | None, timeout_s: float) -> list[Probe] | Line:
    """Probes on all nodes, once the required number of nodes has joined."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    deadline = time.monotonic() + timeout_s
    while len(alive := [node for node in ray.nodes() if node["Alive"]]) < (nodes or 1):
        if time.monotonic() > deadline:
            hosts = ", ".join(node["NodeManagerHostname"] for node in alive)
            return Line(
                "nodes",
                False,
                f"{len(alive)} of {nodes} joined in {timeout_s:.0f} s ({hosts}): look at the output of the "
                "others, and check that they can reach the first node over the network",
            )
        time.sleep(0.5)
    probe: Any = ray.remote(NodeProbe)
    return [
        Probe(
            node["NodeManagerHostname"],
            node["NodeManagerAddress"],
            int(node["Resources"].get("GPU", 0)),
            probe.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(),
        )
        for node in alive
    ]


@contextmanager
def _marker(directory: Path) -> Iterator[str]:
    """Inside, a file exists in the run directory that all nodes must see; yields its name."""
    name = f".preflight-{secrets.token_hex(8)}.tmp"
    (directory / name).touch()
    try:
        yield name
    finally:
        with suppress(OSError):
            (directory / name).unlink()


def _first_line(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"


if __name__ == "__main__":
    sys.exit(main())
