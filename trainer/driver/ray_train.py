"""Ray's side of a run: one Ray Train worker per rank, restarts, the connection of workers and driver.

Nothing here knows about training. `fit` starts the ranks and returns how the run ended. Each rank gets its place in the
group from Ray Train's environment and talks to the driver through a small actor, `StateActor`, without waiting for it.
Ray reads its settings from the environment at import, so `set_up_ray` must be called first.

Ray Train restarts a group that fails, with as many ranks as there is room for. To enlarge a group, Ray would also kill
a healthy one and lose the work since the last checkpoint. So Ray's own check is switched off: the driver asks the ranks
to stop at a checkpoint, and only then lets Ray start more of them.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray
import ray.train
from ray.exceptions import RayError
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from data.processes.signals import StopRequest, handle_stop_signals
from data.storage.errors import OperationError, UserError
from trainer.checkpoint.lease import LAUNCH_VARIABLE, this_process
from trainer.config.command_line import start_logging
from trainer.config.draft import ConfigError
from trainer.config.sections import ScalingConfig
from trainer.config.train_config import TrainConfig
from trainer.driver.connection import connected, is_local
from trainer.driver.controller import GROUP_VARIABLE, Rendezvous, Trainer
from trainer.driver.gauges import GAUGES, TAGS, gauges_of
from trainer.driver.preemption import PreemptionNotice
from trainer.driver.room import Waiting, check_room, places
from trainer.driver.scale_up import ScaleUp
from trainer.driver.state_actor import FinalError, Snapshot, StateActor, is_lost_peer
from trainer.rank.divergence import DivergenceError
from trainer.rank.progress import Outcome, ProgressBar, RunStatus
from trainer.rank.worker import run_rank

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 0.2
FINAL_PAUSE_S = 30.0
NEVER_S = 1e9


class RunFailedError(OperationError):
    """The workers failed more often than the config allows."""


class RunDivergedError(RunFailedError):
    """Too many updates in a row were skipped."""


class RayDriver:
    """A worker's connection to the state actor: sends at most a few times a second, never waits for the answer."""

    def __init__(self, state: Any, group: str, run: str) -> None:
        self._state, self._group, self._run = state, group, run
        self._gauges: dict[str, Gauge] = {}
        watched = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"
        self._notice = PreemptionNotice(ray.train.get_preemption_info) if watched else None
        self._sent_at = float("-inf")
        self._stop_asked = state.stop_asked.remote()
        self.step: int | None = None

    def report(self, status: RunStatus) -> None:
        """Send `status` unless one was sent just before; the last step is always sent."""
        self.step = status.step
        if time.monotonic() - self._sent_at > REPORT_INTERVAL_S or status.images == status.total_images:
            self._state.post.remote(self._group, status)
            self._sent_at = time.monotonic()

    def show(self, curves: Mapping[str, float]) -> None:
        """Set the gauges that the node's metrics port shows to Prometheus; Ray collects them later."""
        for name, tags, value in gauges_of(curves, self._run):
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, GAUGES[name], TAGS)
            self._gauges[name].set(value, tags)

    def stop_requested(self) -> bool:
        """Whether the driver wants to stop, or a node goes. A dead driver cannot ask; Ray then ends the worker."""
        return self.wait_for_stop(timeout_s=0) or (self._notice is not None and self._notice.given)

    def wait_for_stop(self, timeout_s: float) -> bool:
        """Wait for a stop request, at most `timeout_s`."""
        return bool(ray.wait([self._stop_asked], timeout=timeout_s)[0])


def _train_rank(config: TrainConfig, launch: str, state: Any) -> None:
    """Run by Ray Train on each worker."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(context.get_local_rank()), "WORLD_SIZE": str(world_size)}
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())
    os.environ[LAUNCH_VARIABLE] = launch  # a restarted group takes over its own lease
    config = replace(config, scaling=replace(config.scaling, world_size=world_size))
    start_logging(rank)
    group = os.environ[GROUP_VARIABLE]
    driver = RayDriver(state, group, Path(config.run.directory).name)
    if rank == 0 and not _await_turn(driver, state, group, world_size):  # the others wait for its store
        return _await_the_end()
    if rank == 0:
        log.info("training on %d ranks", world_size)
    try:
        result: Outcome | FinalError = run_rank(config, driver)
    except UserError as error:
        result = FinalError(str(error), is_refusal=True)
    except DivergenceError as error:  # the workers have already retried
        result = FinalError(str(error), is_refusal=False, diverged=True)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        message = f"rank {rank}: {type(error).__name__}: {first_line}"
        ray.get(state.post_error.remote(group, message, driver.step))
        if is_lost_peer(message):
            _keep_traceback_off_the_terminal()
        raise
    if rank == 0 or isinstance(result, FinalError):
        ray.get(state.post_result.remote(group, result))
    if isinstance(result, FinalError):
        _await_the_end()
    return None


def _keep_traceback_off_the_terminal() -> None:
    """Ray Train logs the traceback of the error that a rank raises. If the rank has only lost another one, the message
    that the driver shows says as much, and the traceback belongs into Ray's log files."""

    def lower(record: logging.LogRecord) -> bool:
        record.levelno, record.levelname = logging.INFO, "INFO"
        return True

    logging.getLogger("ray.train.v2._internal.util").addFilter(lower)


def _await_turn(driver: RayDriver, state: Any, group: str, world_size: int) -> bool:
    """Delay a group that follows a failure; a stop request ends the delay. False: the group should not start."""
    pause_s: float | None = ray.get(state.begin.remote(group, world_size))
    if pause_s:
        log.warning("the workers have failed repeatedly: restarting in %.0f s", pause_s)
        driver.wait_for_stop(pause_s)
    return pause_s is not None


def _await_the_end() -> None:
    """Wait for the driver to end the run. Ray would take a return for success, and would restart after an exception."""
    time.sleep(FINAL_PAUSE_S)


def _possible_ranks(scaling: ScalingConfig, world_size: int) -> int:
    """Ranks that an elastic run of `world_size` could continue with; more only if there is room for one more."""
    if scaling.min_world_size is None:
        return world_size
    free = ray.available_resources()
    if free.get("CPU", 0) < scaling.cpus_per_worker or (scaling.device == "gpu" and free.get("GPU", 0) < 1):
        return world_size
    return min(places(ray.nodes(), scaling), scaling.world_size)


def fit(
    config: TrainConfig,
    on_restart: Callable[[str], None] = lambda reason: None,
    on_phase: Callable[[Literal["ranks", "waiting"]], None] = lambda phase: None,
) -> Outcome:
    """Run all ranks to the end, or until SIGINT or SIGTERM stops them; shows one progress bar.

    Args:
        config: with absolute paths.
        on_restart: is told why the ranks are started again.
        on_phase: is told, again and again, whether there is room for the ranks or the run waits for nodes.

    Raises:
        ClusterError: the cluster cannot run it.
        ConfigError: a worker found that the run cannot be resumed or that its input does not fit.
        RunFailedError: the ranks failed more than `scaling.max_failures` times, three times at the same step, or in a
            way that a restart cannot fix.
    """
    with connected() as logs:
        check_room(ray.nodes(), config.scaling)
        state = _start_state_actor()
        scale_up = ScaleUp(partial(_possible_ranks, config.scaling))
        waiting = Waiting(ray.nodes, config.scaling)

        def look() -> None:
            if news := waiting.news():
                log.warning("%s", news)
            on_phase("waiting" if waiting.waits else "ranks")

        with _stop_on_signals(state) as stop, ProgressBar() as bar:
            while True:
                try:
                    outcome = _fit_group(config, state, scale_up, look, bar, on_restart)
                except RunFailedError as error:
                    raise type(error)(f"{error}\nRay's logs of all processes are in {logs}") from error
                if outcome.finished or stop.asked:
                    return outcome
                ray.get(state.withdraw_stop.remote())  # it stopped for more ranks, or because a node goes
                if stop.asked:  # meanwhile; withdraw_stop may have cleared the request
                    return outcome


def _fit_group(
    config: TrainConfig,
    state: Any,
    scale_up: ScaleUp,
    look: Callable[[], None],
    bar: ProgressBar,
    on_restart: Callable[[str], None],
) -> Outcome:
    """One call of Ray Train, including Ray's own restarts; ends early if the run can grow."""
    trainer = _make_trainer(config, state)
    failure: list[BaseException] = []

    def call_fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    # fit runs in its own thread: in the main thread it would handle SIGINT itself and kill the workers.
    thread = threading.Thread(target=call_fit, name="ray-train", daemon=True)
    thread.start()
    seen, told = _read(state), None
    while thread.is_alive() and not isinstance(seen.result, FinalError):
        thread.join(timeout=0.5)
        seen = _read(state)
        if seen.status:
            bar.show(seen.status)
        if seen.failure and seen.failure != told and seen.result is None:
            log.warning("%s: starting the ranks again", seen.failure)
            on_restart(str(seen.failure))
            told = seen.failure
        look()
        if ranks := scale_up.possible(seen.world_size):
            log.warning("there is room for %d ranks: saving a checkpoint and continuing with them", ranks)
            state.ask_to_stop.remote()
    seen = _read(state)  # the ranks' last messages may have arrived after the last read
    if isinstance(seen.result, FinalError):
        if seen.result.is_refusal:
            raise ConfigError([seen.result.message])
        raise (RunDivergedError if seen.result.diverged else RunFailedError)(seen.result.message)
    if not failure and isinstance(seen.result, Outcome):
        return seen.result
    summary = ray.get(state.summarize_failures.remote(config.scaling.max_failures))
    raise RunFailedError(str(summary or f"the workers failed: {failure[0] if failure else 'no result was reported'}"))


def _start_state_actor() -> Any:
    """Start the actor on the driver's own node, so that it does not die with another node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(StateActor)
    # Each rank of each attempt leaves an open call that waits for a stop; these must not use up the concurrency limit.
    return actor.options(num_cpus=0, scheduling_strategy=here, max_concurrency=1_000_000).remote()


def _read(state: Any) -> Snapshot:
    try:
        return ray.get(state.read.remote())
    except RayError as error:
        raise RunFailedError(f"the driver's own Ray process is gone: {error}") from error


def _make_trainer(config: TrainConfig, state: Any) -> Trainer:
    scaling = config.scaling
    failures_before: Any = ray.get(state.count_failures.remote())  # one limit for all calls of Ray Train
    resources = {"CPU": scaling.cpus_per_worker} | ({"GPU": 1} if scaling.device == "gpu" else {})
    return Trainer(
        # Not as train_loop_config, which the controller unpickles too.
        partial(_train_rank, config, this_process(), state),
        backend_config=Rendezvous(loads=__name__),
        ends_with_run=is_local(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(scaling.min_world_size, scaling.world_size) if scaling.min_world_size else scaling.world_size,
            elastic_resize_monitor_interval_s=NEVER_S,
            use_gpu=scaling.device == "gpu",
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            # A new name for each start: a run's progress is in our checkpoints, not in Ray's records.
            name=time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}",
            storage_path=str(Path(config.run.directory) / "ray"),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),  # the rest is in its log files
            failure_config=ray.train.FailureConfig(max_failures=max(0, scaling.max_failures - failures_before)),
        ),
    )


@contextmanager
def _stop_on_signals(state: Any) -> Iterator[StopRequest]:
    """The first signal asks the workers to save a checkpoint and stop; a second one ends the driver."""
    stop = StopRequest()

    def ask(number: int, _frame: object) -> None:
        was_asked = stop.asked
        if stop.note():
            raise KeyboardInterrupt
        if was_asked:
            return
        log.warning(
            "%s: finishing the step and writing a checkpoint; again to stop at once", signal.Signals(number).name
        )
        state.ask_to_stop.remote()

    before = handle_stop_signals(ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
