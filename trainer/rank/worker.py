"""What one rank does: build, resume, train, close."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from data.shards.index import load_index
from data.stream.batches import BadSampleLimit, Batch, BatchIterator
from trainer.checkpoint.format import Checkpoint
from trainer.config.io import flat, shown_config
from trainer.config.train_config import TrainConfig
from trainer.engine.ranks import Ranks
from trainer.rank.build import build
from trainer.rank.divergence import Diverged
from trainer.rank.hooks import (
    AveragedGenerator,
    Curves,
    DrawGrid,
    Evaluate,
    LogCurves,
    ReportStatus,
    SaveCheckpoint,
    write_snapshot,
)
from trainer.rank.loop import Hook, Loop, Share, open_share
from trainer.rank.progress import Driver, Outcome
from trainer.rank.replaced import ReplacedSamples
from trainer.rank.run_checkpoints import RunCheckpoints
from trainer.rank.run_folder import make_run_directory, outcome_at
from trainer.rank.state import TrainingState
from trainer.rank.watchdog import Watchdog
from trainer.tracking.provenance import collect_tags
from trainer.tracking.spool import Status
from trainer.tracking.tracker import NullTracker, Tracker, open_tracker

log = logging.getLogger(__name__)


class Worker:
    """One rank of a run, from building the networks to closing them."""

    def __init__(self, config: TrainConfig, ranks: Ranks, driver: Driver, watchdog: Watchdog | None = None) -> None:
        """Take the run's lease, find its newest checkpoint, and build the networks."""
        self.config, self.ranks, self.driver = config, ranks, driver
        self.watchdog = watchdog or Watchdog(None)
        self.tracker: Tracker = NullTracker()
        self.index = load_index(config.data.path)
        limit = BadSampleLimit(max_percent=config.data.max_bad_percent, num_samples=self.index.num_samples)
        self.replaced = ReplacedSamples(Path(config.run.directory), ranks, limit)
        self.checkpoints = RunCheckpoints(config, ranks)
        try:
            self.checkpoint = self.checkpoints.newest()
            self.learner = build(config, ranks, fresh=self.checkpoint is None)
            self.state = TrainingState(config, ranks, self.index, self.learner)
            self.averaged = AveragedGenerator(config, ranks, self.learner)
        except BaseException:
            self.checkpoints.release()
            raise

    def run(self) -> Outcome:
        """Train from the newest valid checkpoint, or from the start, until the end or until asked to stop."""
        config, ranks, checkpoint = self.config, self.ranks, self.checkpoint
        loop = Loop(
            config=config,
            ranks=ranks,
            share=Share.of(config, ranks.rank, ranks.world_size),
            learner=self.learner,
            batches=iter(()),
            driver=self.driver,
            watchdog=self.watchdog,
        )
        status: Status = "FAILED"
        with ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            if checkpoint:
                self._resume(loop, checkpoint)
            self.checkpoints.start(self.state, checkpoint.step if checkpoint else None)
            if ranks.rank == 0:
                self._open_tracker()
                stack.callback(lambda: self.tracker.close(status))
            loop.hooks = self._hooks(checkpoint)
            finished = self._train(loop)
            self.watchdog.enter("end")
            if finished:  # before the last checkpoint, which marks the run as done
                write_snapshot(config, self.averaged, ranks, self.tracker, loop.step)
            self.checkpoints.save_last(lambda: loop.hooks[-1].run(loop), loop.step)
            status = "FINISHED" if finished else "KILLED"
        return outcome_at(config, loop.step)

    def _hooks(self, checkpoint: Checkpoint | None) -> tuple[Hook, ...]:
        """The hooks in the order in which they run; saving comes last."""
        config, tracker = self.config, self.tracker
        curves = Curves(checkpoint.manifest.get("metrics", {}) if checkpoint else {})
        return (
            LogCurves(config.tracking.log_interval_steps, tracker, curves, self.checkpoints, self.replaced),
            ReportStatus(self.driver),
            DrawGrid(config, self.averaged, tracker, self.index.class_names or ()),
            Evaluate(config, self.ranks, self.averaged, tracker, curves),
            SaveCheckpoint(
                config.checkpoint.save_interval_steps, self.checkpoints, self.state, tracker, curves, self.replaced
            ),
        )

    def _train(self, loop: Loop) -> bool:
        """Run the loop; go back to the last checkpoint if too many updates are skipped. Returns whether it finished."""
        while True:
            with closing(self._open_batches(loop)) as batches:
                loop.batches = self._noted(batches, loop)
                try:
                    return loop.run()
                except Diverged as raised:
                    diverged = raised
            self._roll_back(loop, diverged)

    def _resume(self, loop: Loop, checkpoint: Checkpoint) -> None:
        """Restore the state of a checkpoint. A collective."""
        self.state.restore(checkpoint, loop.statistics)
        self.checkpoints.forget_downloads()
        loop.step = checkpoint.step

    def _roll_back(self, loop: Loop, diverged: Diverged) -> None:
        """Go back to the last checkpoint, in this process. A collective."""
        self.watchdog.enter("start")
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            raise diverged.error("there is no checkpoint to go back to, and a restart would fail at the same step")
        if diverged.final:
            raise diverged.error(
                f"guard.max_rollbacks ({self.config.guard.max_rollbacks}) is reached for the same steps. The last "
                f"checkpoint is {checkpoint.path}"
            )
        if self.ranks.rank == 0:
            log.warning("%s. Going back to step %d, %s", diverged, checkpoint.step, checkpoint.path)
        self._resume(loop, checkpoint)

    def _open_batches(self, loop: Loop) -> BatchIterator:
        return open_share(self.config, self.index, loop.share, loop.step, pin=self.ranks.device.type == "cuda")

    def _noted(self, batches: Iterable[Batch], loop: Loop) -> Iterator[Batch]:
        for batch in batches:
            loop.statistics.count_replaced(len(batch.replaced))
            self.replaced.note(batch.replaced)
            yield batch

    def close(self) -> None:
        """Finish a save in progress, and release lease and engines."""
        self.checkpoints.close()
        self.learner.close()

    def _open_tracker(self) -> None:
        checkpoint, directory = self.checkpoint, Path(self.config.run.directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(text := shown_config(self.config), encoding="utf-8")
        if self.config.tracking.backend == "mlflow":
            self.tracker = open_tracker(
                self.config.tracking,
                directory,
                params=flat(self.config),
                config_yaml=text,
                tags=collect_tags(self.index.digest),
                run_name=directory.name,
                last_step=checkpoint.step if checkpoint else None,
                run_id=checkpoint.manifest.get("mlflow_run_id") if checkpoint else None,
            )


def prepare_torch(config: TrainConfig) -> None:
    """Set threads, number formats and determinism of this process; call it before anything is computed."""
    if config.scaling.device == "cpu":
        torch.set_num_threads(config.scaling.cpus_per_worker)
    # TF32 keeps only 10 bits of mantissa: fp32 runs and the R1 penalty would not be computed in float32.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def run_rank(config: TrainConfig, driver: Driver) -> Outcome:
    """Join the group, train, leave the group."""
    prepare_torch(config)
    scaling, rank = config.scaling, int(os.environ.get("RANK", 0))
    directory = make_run_directory(config.run)
    with Watchdog(scaling.watchdog_s, allowance_s=scaling.timeout_s, rank=rank, directory=directory) as watchdog:
        ranks = Ranks.join(scaling.device, scaling.timeout_s)
        try:
            worker = Worker(config, ranks, driver, watchdog)
            try:
                return worker.run()
            finally:
                worker.close()
        finally:
            ranks.leave()
