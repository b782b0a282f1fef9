"""What a launcher asks a cluster for: a config, the arguments of trainer.run, nodes, and a name for it all."""

import argparse
import hashlib
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.io import ConfigError, inside_ray_job, with_absolute_paths
from trainer.config.sections import ScalingConfig
from trainer.config.train_config import TrainConfig
from trainer.run import config_of, parse_arguments

ROOT = Path(__file__).resolve().parents[1]
"""The checkout: what is submitted, and where paths in configs start."""
ENTRYPOINT = ("python", "-m", "cluster.launch", "train")
"""What every way runs in the end: preflight, then training."""
_MAX_NAME = 40  # KubeRay allows 47 for a RayJob, and some systems cut longer ones in what they show


@dataclass(frozen=True)
class Request:
    """One run to be submitted.

    Attributes:
        config: resolved, with the number of ranks that the nodes make.
        arguments: for trainer.run; they give that config.
        name: of the run directory; the same for each submission of a run.
        nodes: how many.
        gpus_per_node, cpus_per_node: what each has for its ranks.
    """

    config: TrainConfig
    arguments: tuple[str, ...]
    name: str
    nodes: int
    gpus_per_node: int
    cpus_per_node: int

    @property
    def entrypoint(self) -> str:
        """The command that trains, for a shell."""
        return shlex.join([*ENTRYPOINT, *self.arguments])


def name_of(directory: str) -> str:
    """The name of the run in a directory: its last part as letters, digits and dashes, and six digits of its path."""
    absolute = str(Path(directory).absolute())
    slug = re.sub(r"[^a-z0-9]+", "-", Path(absolute).name.lower()).strip("-")[: _MAX_NAME - 7].strip("-")
    slug = slug if slug[:1].isalpha() else f"run-{slug}".strip("-")  # Kubernetes wants a letter in front
    return f"{slug[: _MAX_NAME - 7]}-{hashlib.sha256(absolute.encode()).hexdigest()[:6]}"


def make_request(
    config: str, more: Sequence[str], *, nodes: int | None, gpus_per_node: int | None, elsewhere: bool
) -> Request:
    """Check what is asked for, before anything is submitted.

    Args:
        config: as `--config` of trainer.run.
        more: further arguments of trainer.run.
        nodes: None: the cluster has what it has, and the config says how many ranks there are.
        gpus_per_node: None: 0 for a config of CPUs.
        elsewhere: the run sees neither this machine's files nor its current folder, but the checkout.

    Raises:
        ConfigError: the config, the arguments or the numbers do not fit.
    """
    arguments = ["--config", config, *more]
    options = parse_arguments(arguments)
    if options.dry_run:
        raise ConfigError(["--dry-run comes before --, as an argument of launch.sh: nothing is submitted then"])
    wanted = config_of(options)
    scaling = wanted.scaling
    if nodes is not None:
        gpus_per_node = _gpus(scaling, gpus_per_node)
        ranks = nodes * gpus_per_node
        if ranks and ranks != scaling.world_size:
            if any(text.startswith("scaling.world_size=") for text in options.set):
                raise ConfigError(
                    [
                        f"scaling.world_size is {scaling.world_size}, but {nodes} nodes of {gpus_per_node} GPUs make "
                        f"{ranks} ranks: leave that --set out, or change --nodes or --gpus-per-node"
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
            ["--gpus-per-node is missing, and scaling.device is gpu: say how many GPUs a node has, such as 8"]
        )
    gpus = gpus_per_node or 0
    if (scaling.device == "gpu") != (gpus > 0):
        raise ConfigError(
            [
                f"--gpus-per-node is {gpus}, and scaling.device {scaling.device}: "
                + ("give 1 or more, or -- --set scaling.device=cpu" if gpus == 0 else "give 0, or leave it out")
            ]
        )
    return gpus


def _check_config_file(config: str) -> None:
    """A file travels only as part of the checkout."""
    path = Path(config)
    if "/" in config and (path.is_absolute() or not path.resolve().is_relative_to(ROOT)):
        raise ConfigError(
            [f"--config is {config}: only files of {ROOT} travel to the cluster, by their path from there. Copy it in"]
        )


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def not_negative(text: str) -> int:
    """A whole number from 0 on, for argparse."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 on")
    return int(text)


def job_config(arguments: Sequence[str]) -> TrainConfig:
    """The config that arguments of trainer.run give, with absolute paths, where the run is.

    Raises:
        ConfigError: it is wrong.
    """
    return with_absolute_paths(config_of(parse_arguments(arguments)), inside_job=inside_ray_job())
