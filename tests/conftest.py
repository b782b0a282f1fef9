"""Fixtures shared by several test folders."""

import gc
import logging
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

from data.prepare import command as prepare

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

# Without a GPU, fused operators run in Triton's interpreter. Triton reads this once, when a library imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The networks are small: a second thread gains nothing, and on a busy machine it spins while it waits for a core.
torch.set_num_threads(1)
# By default Ray's workers let everything else on the machine go first, and its timeouts run meanwhile.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

# An example's duration depends on how busy the machine is: a deadline would fail at random.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")

PUBLISHED_GAME = (
    "data.num_classes=0",
    "diffusion.num_timesteps=4",
    "training.objective=non_saturating",
    "training.r2_gamma=0",
    "training.reconstruction.weight=0",
)
"""Overrides of `digits` for the published method: without classes, non-saturating, four steps, R1 alone."""
TINY = (
    *PUBLISHED_GAME,
    "data.image_size=8",
    "data.loader_workers=0",
    "generator.base_channels=8",
    "generator.channel_multipliers=[1, 2]",
    "generator.attention_resolutions=[4]",
    "generator.latent_dim=8",
    "generator.latent_embedding_dim=16",
    "discriminator.base_channels=4",
    "discriminator.time_embedding_dim=16",
    "training.global_batch_size=16",
    "training.total_images=160",
    "training.r1_interval_steps=2",
    "tracking.backends=[]",
    "tracking.log_interval_steps=4",
    "grids.num_images=4",
    "grids.interval_steps=null",
    "evaluation.interval_images=null",
    "checkpoint.save_interval_steps=null",
)
"""Overrides of `digits` for tiny networks and runs of ten steps that take a second or two."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fuzz-minutes` says how long each test of the marker `fuzz` damages its inputs."""
    parser.addoption("--fuzz-minutes", type=float, default=None, help="minutes of each fuzz test (a fixed few inputs)")


CLUSTERS = {
    "of several hosts": ("tests/integration/test_slurm.py", "tests/integration/test_two_hosts.py"),
    "of this machine": (
        *(
            f"tests/integration/test_{name}.py"
            for name in ("photographs", "ray_failures", "rayjob", "console", "open_ports")
        ),
        "tests/cluster/sweep/test_killed_sweep.py",
        "tests/data/prepare/test_on_ray.py",
    ),
}
"""Tests with Ray, Slurm or two hosts: each starts many processes, and part of its time goes by in waiting. Those of one
group run one at a time: only one Ray of a machine gets the port of the agents that take jobs."""


def _group(nodeid: str) -> str | None:
    """The group of clusters that a test belongs to."""
    return next((name for name, files in CLUSTERS.items() if nodeid.startswith(files)), None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests with clusters first, then slow ones, then the rest; whole files at a time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (_group(item.nodeid) is None, item.path not in slow))


def pytest_collection_finish() -> None:
    """Exempt all that was imported from garbage collection: it stays, and each full collection would walk it.

    DeepSpeed asks for a collection with each engine at ZeRO-3, which takes half a second among a million objects.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadScopeScheduling":
    """Distribute the tests over processes (`-n 3`): each group of clusters to one process, each other file to one."""
    from xdist.scheduler import LoadFileScheduling

    class GroupsInOne(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid) or super()._split_scope(nodeid)

    config.option.loadscopereorder = False  # keep the order of the collection, set above
    return GroupsInOne(config, log)


@pytest.fixture(autouse=True)
def environment_as_before() -> Iterator[None]:
    """Undo what a test, or a library that it called, left in the environment.

    MLflow's server, for one, sets MLFLOW_TRACKING_URI in the process that answers its requests.
    """
    before = dict(os.environ)
    yield
    now = dict(os.environ)
    for name in now.keys() | before.keys():
        if name == "PYTEST_CURRENT_TEST" or now.get(name) == before.get(name):
            continue  # the first is pytest's own and changes with each phase of a test
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Undo what a command that a test called in this process has set up: log lines on stderr."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in root.handlers[:]:
        if not type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)


CHECKED = tuple(f"tests/{folder}/" for folder in ("models", "trainer/algorithm"))
"""Tests whose calls have the shapes of their arguments checked even if they are slow."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Check shapes at run time in quick tests, and in those of the networks and of the algorithm.

    Slow tests elsewhere are whole runs that make the same calls thousands of times: checks take a third of the time.
    """
    is_run = item.get_closest_marker("slow") is not None and not item.nodeid.startswith(CHECKED)
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", before or is_run)
    try:
        return (yield)
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def tiny_digits(tmp_path_factory) -> Path:
    """The embedded digits, prepared at 8 px."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    assert prepare.main(["digits", "--out", str(folder), "--size", "8", "--workers", "1"]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_digits) -> tuple[str, ...]:
    """`TINY` with the prepared data; a test adds its own run.directory."""
    return (*TINY, f"data.path={tiny_digits}")
