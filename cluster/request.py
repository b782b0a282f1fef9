"""What a launcher asks a cluster for: a config, the arguments of trainer.run, nodes, and a name."""

import hashlib
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.draft import ConfigError
from trainer.config.io import inside_ray_job, with_absolute_paths
from trainer.config.sections import ScalingConfig
from trainer.config.train_config import TrainConfig
from trainer.run import config_of, parse_arguments

ROOT = Path(__file__).resolve().parents[1]
"""The checkout. It is what is submitted, and paths in configs are relative to it."""
ENTRYPOINT = ("python", "-m", "cluster.launch", "train")
"""The command that every launcher runs in the end: preflight, then training."""
_MAX_NAME = 40  # KubeRay allows 47 for a RayJob, and some systems truncate longer names in their output


@dataclass(frozen=True)
class Request:
    """One run to be submitted.

    Attributes:
        config: the resolved config, with the number of ranks that the nodes provide.
        arguments: arguments of trainer.run that give this config.
        name: name derived from the run directory; the same for each submission of a run.
        nodes: number of nodes.
        gpus_per_node, cpus_per_node: what each node has for its ranks.
    """

    config: TrainConfig
    arguments: tuple[str, ...]
    name: str
    nodes: int
    gpus_per_node: int
    cpus_per_node: int

    @property
    def entrypoint(self) -> str:
        """The training command, for a shell."""
        return shlex.join([*ENTRYPOINT, *self.arguments])


def name_of(directory: str) -> str:
    """The name of a run: the last part of its directory as letters, digits and dashes, and a short hash of its path."""
    absolute = str(Path(directory).absolute())
    slug = re.sub(r"[^a-z0-9]+", "-", Path(absolute).name.lower()).strip("-")[: _MAX_NAME - 7].strip("-")
    slug = slug if slug[:1].isalpha() else f"run-{slug}".strip("-")  # Kubernetes requires a letter first
    return f"{slug[: _MAX_NAME - 7]}-{hashlib.sha256(absolute.encode()).hexdigest()[:6]}"


def make_request(
    config: str, more: Sequence[str], *, nodes: int | None, gpus_per_node: int | None, elsewhere: bool
) -> Request:
    """Check the arguments and make a request, before anything is submitted.

    Args:
        config: as `--config` of trainer.run.
        more: further arguments of trainer.run.
        nodes: number of nodes; None: use the existing cluster, and the number of ranks in the config.
        gpus_per_node: GPUs per node; None: 0, allowed only for a config that trains on CPUs.
        elsewhere: the run sees only the checkout, not this machine's files or current folder.

    Raises:
        ConfigError: the config, the arguments or the numbers are wrong or contradict each other.
    """
    arguments = ["--config", config, *more]
    options = parse_arguments(arguments)
    if options.dry_run:
        raise ConfigError(["--dry-run is given after --: give it before --, as an argument of launch.sh"])
    if nodes and gpus_per_node and options.gpus not in (None, nodes * gpus_per_node):
        made = nodes * gpus_per_node
        raise ConfigError(
            [
                f"--gpus is {options.gpus}, but {nodes} nodes with {gpus_per_node} GPUs make {made}: omit --gpus, or "
                "change it, --nodes or --gpus-per-node"
            ]
        )
    wanted = config_of(options)
    scaling = wanted.scaling
    if nodes is not None:
        gpus_per_node = _gpus(scaling, gpus_per_node)
        ranks = nodes * gpus_per_node
        if ranks and ranks != scaling.world_size:
            if any(text.startswith("scaling.world_size=") for text in options.set):
                raise ConfigError(
                    [
                        f"scaling.world_size is {scaling.world_size}, but {nodes} nodes with {gpus_per_node} GPUs make "
                        f"{ranks} ranks: omit that --set, or change --nodes or --gpus-per-node"
                    ]
                )
            arguments += ["--set", f"scaling.world_size={ranks}"]
            wanted = config_of(parse_arguments(arguments))
            scaling = wanted.scaling
    if elsewhere:
        _check_config_file(config)
    absolute = with_absolute_paths(wanted, inside_job=elsewhere)
    per_node = gpus_per_node or math.ceil(scaling.world_size / (nodes or 1))
    return Request(
        config=absolute,
        arguments=tuple(arguments),
        name=name_of(absolute.run.directory),
        nodes=nodes or 1,
        gpus_per_node=gpus_per_node or 0,
        cpus_per_node=per_node * scaling.cpus_per_worker,
    )


def _gpus(scaling: ScalingConfig, gpus_per_node: int | None) -> int:
    if gpus_per_node is None and scaling.device == "gpu":
        raise ConfigError(
            ["--gpus-per-node is missing, but scaling.device is gpu: give the number of GPUs per node, such as 8"]
        )
    gpus = gpus_per_node or 0
    if (scaling.device == "gpu") != (gpus > 0):
        raise ConfigError(
            [
                f"--gpus-per-node is {gpus}, but scaling.device is {scaling.device}: "
                + ("give 1 or more, or -- --set scaling.device=cpu" if gpus == 0 else "give 0, or omit it")
            ]
        )
    return gpus


def _check_config_file(config: str) -> None:
    """Refuse a config file outside of the checkout, since only the checkout is sent to the cluster."""
    path = Path(config)
    if "/" in config and (path.is_absolute() or not path.resolve().is_relative_to(ROOT)):
        raise ConfigError(
            [f"--config is {config}, but only files in {ROOT} are sent to the cluster: copy the file there"]
        )


def job_config(arguments: Sequence[str]) -> TrainConfig:
    """The config given by arguments of trainer.run, with absolute paths as the run sees them.

    Raises:
        ConfigError: the config is wrong.
    """
    return with_absolute_paths(config_of(parse_arguments(arguments)), inside_job=inside_ray_job())
