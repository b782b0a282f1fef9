"""Ray's side of a run: a local Ray or a cluster, one Ray Train worker per rank, the line between worker and driver.

Nothing here knows about training. `fit` starts the ranks and returns how the run ended; each rank gets its place in the
group from Ray Train's environment and talks to the driver through a small actor, the board, without waiting for it.
Ray reads its settings from the environment when it is imported: `run.set_up_ray` comes first.
"""

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data.shards import DataError
from trainer.command import start_logging
from trainer.config import TrainConfig
from trainer.config_io import ConfigError
from trainer.progress import ProgressBar, Status
from trainer.snapshot import WeightsError
from trainer.worker import Outcome, run_rank

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.2
REFUSAL_PAUSE_S = 30.0
LOOPBACK = "127.0.0.1"


class ClusterError(RuntimeError):
    """The cluster cannot run this; says what is missing and what to do."""


class RunFailedError(RuntimeError):
    """The workers failed more often than the config allows."""


@dataclass(frozen=True)
class _Refusal:
    """An error of the user's that only a worker could see."""

    message: str


class _Board:
    """The actor between driver and workers: the newest status one way, the request to stop the other way."""

    def __init__(self) -> None:
        self._status: Status | None = None
        self._stop = asyncio.Event()
        self._result: Outcome | _Refusal | None = None

    async def post(self, status: Status) -> None:
        """Keep the newest status."""
        self._status = status

    async def post_result(self, result: "Outcome | _Refusal") -> None:
        """How the run ended; a refusal stays whatever the other ranks say."""
        if not isinstance(self._result, _Refusal):
            self._result = result

    async def ask_to_stop(self) -> None:
        """From the driver."""
        self._stop.set()

    async def stop_asked(self) -> bool:
        """Answers only when the driver wants to stop."""
        return await self._stop.wait()

    async def read(self) -> "tuple[Status | None, Outcome | _Refusal | None]":
        """For the driver."""
        return self._status, self._result


class RayDriver:
    """A worker's line to the board: sends at most a few times a second, and looks for the answer without waiting."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._sent_at = float("-inf")
        self._stop_asked = board.stop_asked.remote()

    def report(self, status: Status) -> None:
        """Post `status` unless one has just been posted; the last step is always posted."""
        if time.monotonic() - self._sent_at > REPORT_INTERVAL_S or status.images == status.total_images:
            self._board.post.remote(status)
            self._sent_at = time.monotonic()

    def stop_requested(self) -> bool:
        """Whether the driver wants to stop. A driver that is gone cannot ask; Ray itself ends the worker then."""
        return bool(ray.wait([self._stop_asked], timeout=0)[0])


def _train_rank(arguments: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    config, board = arguments["config"], arguments["board"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(context.get_local_rank())}
    os.environ["WORLD_SIZE"] = str(context.get_world_size())
    start_logging(rank)
    try:
        result: Outcome | _Refusal = run_rank(config, RayDriver(board))
    except (ConfigError, DataError, WeightsError) as error:
        result = _Refusal(str(error))  # starting again would not help
    if rank == 0 or isinstance(result, _Refusal):
        ray.get(board.post_result.remote(result))
    if isinstance(result, _Refusal):
        time.sleep(REFUSAL_PAUSE_S)  # the driver ends the run meanwhile; to return would look like success to Ray


@contextmanager
def connected() -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names (a Ray job sets it), or start a Ray of our own on this machine."""
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, logging_level=logging.WARNING)
        else:
            _start_local_ray()
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        where = f"the Ray at {address}" if address else "a local Ray"
        raise ClusterError(f"cannot connect to {where}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _start_local_ray() -> None:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    # Ray Train's processes ask the dashboard for the state of their actors, and inherit from here where it is. Left to
    # themselves they take the Ray that was last started by hand on this machine, running or not.
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{LOOPBACK}:{port}"
    ray.init(
        address="local",
        include_dashboard=True,
        dashboard_host=LOOPBACK,
        dashboard_port=port,
        _node_ip_address=LOOPBACK,
        logging_level=logging.WARNING,
    )


def check_resources(config: TrainConfig) -> None:
    """Refuse at once what Ray would wait for without end.

    Raises:
        ClusterError: the cluster has fewer CPUs or GPUs than the ranks need.
    """
    scaling = config.scaling
    gpus = 1 if scaling.device == "gpu" else 0
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    places = 0  # a rank lies on one node with all that it needs
    for node in nodes:
        fits = int(node.get("CPU", 0)) // scaling.cpus_per_worker
        places += min(fits, int(node.get("GPU", 0))) if gpus else fits
    if places >= scaling.world_size:
        return
    have = " and ".join(f"{sum(node.get(kind, 0) for node in nodes):g} {kind}s" for kind in ("CPU", "GPU"))
    needed = f"{scaling.cpus_per_worker} CPUs" + (" and 1 GPU" if gpus else "")
    raise ClusterError(
        f"the cluster has {have} on {len(nodes)} nodes, room for {places} ranks of {needed} each; the run asks for "
        f"scaling.world_size {scaling.world_size}. Lower scaling.world_size or scaling.cpus_per_worker"
        + (", set scaling.device=cpu" if gpus else "")
        + ", or use a larger cluster"
    )


def fit(config: TrainConfig) -> Outcome:
    """Run all ranks to the end, or to a stop by SIGINT or SIGTERM; shows one progress bar.

    Args:
        config: with absolute paths.

    Raises:
        ClusterError: the cluster cannot run it.
        ConfigError: a worker saw that the run cannot be resumed or its input does not fit.
        RunFailedError: the ranks failed more than `scaling.max_failures` times.
    """
    with connected():
        check_resources(config)
        board = _start_board()
        trainer = _make_trainer(config, board)
        failure: list[BaseException] = []
        result: Outcome | _Refusal | None = None

        def call_fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                failure.append(error)

        # fit runs beside the main thread, because in it fit would take SIGINT for itself and kill the workers.
        thread = threading.Thread(target=call_fit, name="ray-train", daemon=True)
        with _stop_on_signals(board), ProgressBar() as bar:
            thread.start()
            while thread.is_alive() and not isinstance(result, _Refusal):
                thread.join(timeout=0.5)
                status, result = _read(board)
                if status:
                    bar.show(status)
            if not isinstance(result, _Refusal):
                _, result = _read(board)
        if isinstance(result, Outcome):
            return result
        if isinstance(result, _Refusal):
            raise ConfigError([result.message])
        raise RunFailedError(f"the workers failed: {failure[0] if failure else 'no result was reported'}")


def _start_board() -> Any:
    """The board on the driver's own node, so that no other node's end takes it away."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(_Board)
    return actor.options(num_cpus=0, scheduling_strategy=here).remote()


def _read(board: Any) -> "tuple[Status | None, Outcome | _Refusal | None]":
    try:
        return ray.get(board.read.remote())
    except RayError as error:
        raise RunFailedError(f"the driver's own Ray process is gone: {error}") from error


def _make_trainer(config: TrainConfig, board: Any) -> TorchTrainer:
    scaling = config.scaling
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.device == "gpu" else {})
    return TorchTrainer(
        _train_rank,
        train_loop_config={"config": config, "board": board},
        torch_config=TorchConfig(backend="nccl" if scaling.device == "gpu" else "gloo", timeout_s=scaling.timeout_s),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.world_size, use_gpu=scaling.device == "gpu", resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            # A name of its own for each start: what a run has reached is in our checkpoints, not in Ray's records.
            name=time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}",
            storage_path=str(Path(config.run.directory) / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=scaling.max_failures),
        ),
    )


@contextmanager
def _stop_on_signals(board: Any) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the workers to stop after a checkpoint; the second ends the driver at once."""
    asked = False

    def ask(number: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        log.warning(
            "%s: finishing the step and writing a checkpoint; again to stop at once", signal.Signals(number).name
        )
        board.ask_to_stop.remote()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
