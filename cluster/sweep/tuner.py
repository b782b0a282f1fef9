"""Ray Tune's side of a sweep: which run starts when, and which ASHA stops.

A trial is an actor without a CPU that starts `trainer.run` as a process of its own, the driver of a run on the same
Ray. So the ranks get all CPUs and GPUs, a run in a sweep is the same as one alone, and nothing of it is in Ray Tune's
records: a new sweep is a new experiment with the runs that are left. Ray's settings are read at import, so
`data.processes.ray_environment.set_up_ray` must be called first.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from cluster.sweep.combinations import SweepRun
from cluster.sweep.table import note_stopped, progress_of
from data.processes.signals import StopRequest, handle_stop_signals
from trainer.config.sections import FIGURES
from trainer.driver.connection import connected
from trainer.driver.room import check_room, places
from trainer.run import STOPPED

LOG = "driver.log"
"""File of a run directory with what its driver printed in a sweep."""
IMAGES = "training_images"
_LOOK_S = 1.0
_SAVING_S = 600
_PR_SET_PDEATHSIG = 1
_OF_A_WORKER = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_NODE_ID")
"""Variables of a process of Ray's that a driver must not inherit."""
_OF_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable of a submitted job; its drivers upload the job's code to the ranks."""


class Sweeping(tune.Trainable):
    """A trial: one run."""

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, config: dict[str, Any], runs: Sequence[SweepRun], stop_file: Path, environment: Mapping[str, str]
    ) -> None:
        """Start the run.

        Args:
            config: its number in `runs`.
            runs: all.
            stop_file: is there when the sweep is to stop.
            environment: variables for its process.
        """
        self._run, self._stop_file, self._asked = runs[config["run"]], stop_file, False
        kept = {name: value for name, value in os.environ.items() if name not in _OF_A_WORKER}
        kept |= {**environment, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        cwd = environment["PWD"]
        with (self._run.directory / LOG).open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "trainer.run", *self._run.arguments],
                cwd=cwd if Path(cwd).is_dir() else None,
                env=kept,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_stop_with_parent,
            )

    def step(self) -> dict[str, Any]:
        """Wait a moment; the figures of the newest checkpoint, and at the end the exit code."""
        if self._stop_file.exists() and not self._asked:
            self._asked = True  # a second signal would end the run before it has saved
            self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_LOOK_S)
        code, progress = self._process.poll(), progress_of(self._run)
        if self._asked and code == -signal.SIGTERM:  # before it had begun
            code = STOPPED
        figures = {name: value for name, value in progress.metrics.items() if name in FIGURES}
        return {IMAGES: progress.images, "done": code is not None, "code": code, **figures}

    def cleanup(self) -> None:
        """Have the run save and stop, if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(_SAVING_S)


def _stop_with_parent() -> None:
    """In the child: get SIGTERM when the actor dies, so that no run is left that nobody waits for (Linux only)."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Told(tune.Callback):
    """Says which run starts and ends, and notes the runs that ASHA has stopped."""

    def __init__(self, runs: Sequence[SweepRun], figure: str | None, say: Callable[[str], None]) -> None:
        self._runs, self._figure, self._say = runs, figure, say
        self.codes: dict[str, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run = self._runs[trial.config["run"]]
        self._say(f"started {run.name}; what it prints is in {run.directory / LOG}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run, last = self._runs[trial.config["run"]], trial.last_result
        code = last.get("code")
        if code is None and self._figure in last:
            note_stopped(run, str(self._figure), last[self._figure], last[IMAGES])
            self._say(f"stopped {run.name} by ASHA: {self._figure} {last[self._figure]:.4g}")
        elif code is not None:
            self.codes[run.name] = code
            self._say({0: f"finished {run.name}", STOPPED: f"stopped {run.name}; it can be resumed"}.get(
                code, f"FAILED {run.name} with exit code {code}: see {run.directory / LOG}"
            ))  # fmt: skip

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        run = self._runs[trial.config["run"]]
        self.codes[run.name] = 1
        self._say(f"FAILED {run.name}: Ray lost it")


def side_by_side(nodes: Sequence[Mapping[str, Any]], runs: Sequence[SweepRun]) -> int:
    """How many runs fit on the nodes at a time; at least one.

    Raises:
        ClusterError: one does not fit.
    """
    for run in runs:
        check_room(nodes, run.config.scaling)
    scalings = [run.config.scaling for run in runs]
    return max(1, min(places(nodes, scaling) // scaling.world_size for scaling in scalings))


def sweep(runs: Sequence[SweepRun], folder: Path, asha: str | None, say: Callable[[str], None]) -> dict[str, int]:
    """Train the runs, as many at a time as there is room for; SIGINT and SIGTERM have them save and stop.

    Args:
        runs: those that are left.
        folder: of all runs, for Ray Tune's records.
        asha: figure by which ASHA stops runs early; None: all go to their end.
        say: is told what starts and ends.

    Returns:
        The exit code of each run that ended, by its name.

    Raises:
        ClusterError: no Ray answers, or it has too little room for one run.
    """
    # Ray Tune reads these. Its own files and tables are not needed, and trials stay in the folder they start in.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_AIR_NEW_OUTPUT": "0"}
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would kill the runs after 5 s
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a run has no figure before its first evaluation
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)  # it misses those files
    with connected(shared=True):
        at_once = side_by_side(ray.nodes(), runs)
        say(f"{len(runs)} runs, {at_once} at a time")
        told = _Told(runs, asha, say)
        stop_file = folder / "ray" / f"stop-{os.getpid()}"
        stop_file.parent.mkdir(exist_ok=True)
        environment = {"PWD": os.getcwd()} | {name: os.environ[name] for name in (_OF_A_JOB,) if name in os.environ}
        trainable: Any = tune.with_parameters(Sweeping, runs=list(runs), stop_file=stop_file, environment=environment)
        # A trial must reserve something: a byte of memory, which leaves all CPUs and GPUs to the ranks.
        trainable = tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": 1}]))
        tuner = tune.Tuner(
            trainable,
            param_space={"run": tune.grid_search(list(range(len(runs))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=at_once, scheduler=_scheduler(runs, asha)),
            run_config=tune.RunConfig(
                name=time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}",
                storage_path=str(folder / "ray"),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a run has its own
                verbose=0,
                callbacks=[told],
            ),
        )
        with _stop_on_signals(stop_file, say):
            tuner.fit()
        return told.codes


@contextmanager
def _stop_on_signals(stop_file: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, a signal has all runs save and stop, by a file that the trials look for; a second ends all at once."""
    stop = StopRequest()

    def ask(number: int, _frame: object) -> None:
        was_asked = stop.asked
        if stop.note():
            raise KeyboardInterrupt
        if not was_asked:
            say(f"{signal.Signals(number).name}: the runs write checkpoints and stop; again to stop at once")
            stop_file.touch()

    before = handle_stop_signals(ask)
    try:
        yield
    finally:
        stop_file.unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _scheduler(runs: Sequence[SweepRun], figure: str | None) -> Any:
    """ASHA (Li et al., arXiv 1810.05934) over the training images, or nothing that stops a run."""
    if figure is None:
        return FIFOScheduler()
    config = runs[0].config
    total, every = config.training.total_images, config.evaluation.interval_images or 1
    mode = config.checkpoint.keep_best_mode
    # Runs may be stopped from a ninth of their length on, after their first evaluation. At their end they still close.
    grace = min(total, max(every, total // 9))
    return ASHAScheduler(IMAGES, metric=figure, mode=mode, max_t=total + 1, grace_period=grace, reduction_factor=3)
