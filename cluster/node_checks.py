"""Checks of a single node: versions, data, run directory, GPUs, memory, limits. Needs no Ray."""

import hashlib
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cluster.tracking_check import ask_store
from data.shards.index import load_index
from data.storage.location import DataError, is_remote
from data.storage.redaction import redact
from trainer.config.train_config import TrainConfig
from trainer.tracking.provenance import library_versions
from trainer.tracking.store import TrackingError, check_trackers, has_store, tracker_uris

PACKAGES = ("trainer", "models", "data", "cluster")
MIN_OPEN_FILES = 4096
MIN_SHM_MB = 64
"""Ranks keep their batches in shared memory; NCCL and gloo keep their buffers there."""
BUSY_SHARE = 0.10
"""Share of a GPU's memory that may be in use before a run; drivers and displays take less."""


@dataclass(frozen=True)
class NodeReport:
    """The result of a node's checks.

    Attributes:
        host: host name of the node.
        versions: versions of Python and the libraries, and a hash of the project's source as `project`.
        problems: description of the problem for each failed check.
        facts: what to show for each passed check.
    """

    host: str
    versions: dict[str, str]
    problems: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


def examine(config: TrainConfig, marker: str | None, gpus: int) -> NodeReport:
    """Check this node.

    Args:
        config: the run's config.
        marker: name of a file that another node has created in the run directory; None: there is no other node.
        gpus: number of GPUs that ranks may use here; 0: GPUs are not checked.
    """
    problems: dict[str, str] = {}
    facts: dict[str, str] = {}
    checks = {
        "shards": lambda: check_shards(config),
        "run directory": lambda: check_run_directory(Path(config.run.directory), marker),
        "shared memory": lambda: check_shared_memory(config),
        "open files": check_open_files,
        "tracking": lambda: check_tracking(config),
    }
    if gpus:
        checks["GPUs"] = lambda: check_gpus(gpus)
    for name, check in checks.items():
        try:
            facts[name] = check()
        except CheckError as error:
            problems[name] = str(error)
    return NodeReport(socket.gethostname(), versions(), problems, facts)


class CheckError(Exception):
    """A check failed; the message says what was found, and what to do."""


def versions() -> dict[str, str]:
    """The versions that must be the same on all nodes."""
    found = library_versions()
    return {
        "python": platform.python_version(),
        **{name: found[name] for name in ("torch", "deepspeed", "ray")},
        "project": source_digest(Path(__file__).resolve().parents[1]),
    }


def source_digest(root: Path) -> str:
    """First twelve hex digits of the SHA-256 of the project's code and configs."""
    digest = hashlib.sha256()
    files = (file for package in PACKAGES for file in (root / package).rglob("*") if file.suffix in (".py", ".yaml"))
    for file in sorted(files):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def check_shards(config: TrainConfig) -> str:
    """Check that the data's index can be read here and each local shard has the right size."""
    try:
        index = load_index(config.data.path)
        if not is_remote(config.data.path):
            for shard in index.shards:
                file = Path(index.location) / shard.name
                if not file.is_file() or file.stat().st_size != shard.num_bytes:
                    raise CheckError(
                        f"{file} is missing or has the wrong size: copy the data set again, or mount its folder"
                    )
    except (DataError, OSError) as error:
        raise CheckError(f"{redact(str(error))}. Mount the folder on this node, or give a URL as data.path") from error
    return f"{len(index.shards)} shards, {index.num_samples} images, index {index.digest[:12]}"


def check_run_directory(directory: Path, marker: str | None) -> str:
    """Check that the run directory is writable here and is the same folder as on the other nodes."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CheckError(
            f"{directory} cannot be written: {error.strerror}. Give a run.directory that every node can write"
        ) from error
    if marker and not (directory / marker).exists():
        raise CheckError(
            f"{directory} is a local folder of this node, not the one that the driver sees: give a run.directory on a "
            "filesystem that all nodes share"
        )
    return str(directory)


def check_shared_memory(config: TrainConfig) -> str:
    """Check that /dev/shm has room for the ranks' batches."""
    data, training = config.data, config.training
    channels = data.image_channels + data.condition_channels
    batch_mb = training.global_batch_size * data.image_size**2 * channels / 2**20
    needed = max(MIN_SHM_MB, int(8 * batch_mb))
    free = shutil.disk_usage("/dev/shm").free >> 20
    if free < needed:
        raise CheckError(
            f"/dev/shm has {free} MB free, but {needed} MB are needed: remove files from it, or give the container "
            "more (docker --shm-size, in Kubernetes an emptyDir of medium Memory)"
        )
    return f"{free} MB free"


def check_open_files() -> str:
    """Check that enough files may be open at once."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < MIN_OPEN_FILES:
        raise CheckError(
            f"at most {hard} files may be open, but {MIN_OPEN_FILES} are needed: raise the hard limit (ulimit -Hn, "
            "limits.conf, LimitNOFILE of the service)"
        )
    return "unlimited" if hard == resource.RLIM_INFINITY else str(hard)


def check_tracking(config: TrainConfig) -> str:
    """Check that the trackers can work, and that MLflow's server answers and lets the run in."""
    directory = Path(config.run.directory)
    try:
        check_trackers(config.tracking, directory)
        uris = tracker_uris(config.tracking, directory)
        return ", ".join(ask_store(uri) if has_store([name]) else redact(uri) for name, uri in uris.items()) or "off"
    except TrackingError as error:
        raise CheckError(str(error)) from error


def check_gpus(expected: int) -> str:
    """Check that the GPUs are visible, compute correctly, and are not in use."""
    if not torch.cuda.is_available():
        raise CheckError(
            f"{expected} GPUs are expected, but torch {torch.__version__} finds none: check the driver (nvidia-smi), "
            "that torch is a CUDA build, and that the job was given GPUs"
        )
    found = torch.cuda.device_count()
    if found < expected:
        raise CheckError(f"{expected} GPUs are expected, but {found} found: check CUDA_VISIBLE_DEVICES and nvidia-smi")
    busy, names = [], []
    for number in range(found):
        free, total = torch.cuda.mem_get_info(number)  # before our own CUDA context takes some
        if total - free > BUSY_SHARE * total + 2**30:
            busy.append(f"GPU {number} has {(total - free) >> 20} of {total >> 20} MB in use")
        try:
            ones = torch.ones(1024, 1024, device=f"cuda:{number}")
            wrong = (ones @ ones != 1024).sum().item()
        except RuntimeError as error:
            raise CheckError(f"GPU {number} does not compute: {str(error).splitlines()[0]}. Drain the node") from error
        if wrong:
            raise CheckError(f"GPU {number} computes wrong products: drain the node, and have the GPU tested")
        names.append(torch.cuda.get_device_name(number))
        torch.cuda.empty_cache()
    if errors := uncorrected_errors():
        raise CheckError(f"{errors}: reset the GPU, or drain the node")
    if busy:
        raise CheckError(f"{'; '.join(busy)}: another program uses it. Stop that program (nvidia-smi shows it)")
    return f"{found} x {', '.join(sorted(set(names)))}"


def uncorrected_errors() -> str:
    """Uncorrected GPU memory errors that nvidia-smi reports, as text; empty if there are none, or it cannot tell."""
    query = ["nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    rows = [line.split(", ") for line in done.stdout.splitlines() if ", " in line]
    bad = [
        f"GPU {index} has {count} uncorrected memory errors" for index, count in rows if count.isdigit() and int(count)
    ]
    return "; ".join(bad)
