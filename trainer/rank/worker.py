"""What one rank does: build, resume, train, close."""

import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from data.shards.index import load_index
from data.storage.redaction import redact_values
from data.storage.surroundings import processor
from data.stream.batches import BadSampleLimit, Batch, BatchIterator
from trainer.checkpoint.format import Checkpoint
from trainer.config.io import flat, shown_config
from trainer.config.stages import stage_after
from trainer.config.train_config import TrainConfig, num_steps
from trainer.engine.ranks import Ranks
from trainer.rank.build import build, check_discriminator_start, settle_precision
from trainer.rank.divergence import Diverged
from trainer.rank.hooks import (
    AveragedGenerator,
    Curves,
    DrawGrid,
    Evaluate,
    LogCurves,
    NoteTimes,
    ReportStatus,
    SaveAverages,
    SaveCheckpoint,
    write_snapshot,
)
from trainer.rank.loop import Hook, Loop
from trainer.rank.progress import Driver, Outcome
from trainer.rank.replaced import ReplacedSamples
from trainer.rank.run_checkpoints import RunCheckpoints
from trainer.rank.run_folder import make_run_directory, outcome_at
from trainer.rank.state import TrainingState
from trainer.rank.step.share import Share, open_share
from trainer.rank.watchdog import SLOW, Watchdog
from trainer.timing.event_log import events_file
from trainer.timing.profile import StepProfile
from trainer.timing.time_sheet import TimeSheet
from trainer.tracking.provenance import collect_tags
from trainer.tracking.spool import Status
from trainer.tracking.system import SystemMonitor
from trainer.tracking.tracker import NullTracker, Tracker, open_tracker

log = logging.getLogger(__name__)


class Worker:
    """One rank of a run, from building the networks to closing them."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        driver: Driver,
        watchdog: Watchdog | None = None,
        began: float | None = None,
    ) -> None:
        """Take the run's lease, find its newest checkpoint, and build the networks of the stage that continues.

        Args:
            config: of the run.
            ranks: the ranks, this one among them.
            driver: what started this process.
            watchdog: is told of each phase.
            began: when this start of the run began, in s since 1970; None: now.
        """
        config = settle_precision(config, ranks)
        self.config, self.ranks, self.driver = config, ranks, driver
        self.watchdog = watchdog or Watchdog(None)
        self.tracker: Tracker = NullTracker()
        self.index = load_index(config.data.path)
        limit = BadSampleLimit(max_percent=config.data.max_bad_percent, num_samples=self.index.num_samples)
        self.replaced = ReplacedSamples(Path(config.run.directory), ranks, limit)
        self.tags = collect_tags(self.index.digest) if ranks.rank == 0 else {}
        self.monitor = SystemMonitor(ranks.device, Path(config.run.directory))
        self.checkpoints = RunCheckpoints(config, ranks)
        self.times = self._open_times(began)  # by the holder of the lease alone
        self.profile = self._make_profile()
        self.watchdog.listeners += [self.times.enter, self.profile.enter]
        try:
            self._build(self.checkpoints.newest())
        except BaseException:
            self.checkpoints.release()
            self.times.close(status="FAILED")
            raise

    def _open_times(self, began: float | None) -> TimeSheet:
        if self.ranks.rank != 0:
            return TimeSheet(None)
        config, device = self.config, self.ranks.device
        return TimeSheet(
            events_file(Path(config.run.directory), "rank-0"),
            since=began,
            recorded=SLOW,
            warms_up=True,
            world_size=self.ranks.world_size,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            processor=processor(),
            precision=config.training.precision,
            batch=config.training.global_batch_size,
            tags=redact_values(self.tags),
        )

    def _make_profile(self) -> StepProfile:
        tracking, rank = self.config.tracking, self.ranks.rank
        steps = tracking.profile_steps if rank == 0 or tracking.profile_ranks == "all" else None
        return StepProfile(steps, Path(self.config.run.directory) / "profile", rank, self.ranks.device)

    def _build(self, checkpoint: Checkpoint | None) -> None:
        """Build the stage that continues from a checkpoint."""
        ranks = self.ranks
        self.checkpoint = checkpoint
        self.stage = stage = stage_after(self.config, checkpoint.step if checkpoint else 0)
        if checkpoint is None:
            check_discriminator_start(stage.config)
        self.learner = build(stage.config, ranks, fresh=checkpoint is None, first_step=stage.first_step)
        self.state = TrainingState(self.config, stage, ranks, self.index, self.learner)
        self.averaged = AveragedGenerator(stage.config, ranks, self.learner)

    def run(self) -> Outcome:
        """Train from the newest valid checkpoint, or from the start, until the end or until asked to stop."""
        config, ranks, checkpoint = self.config, self.ranks, self.checkpoint
        status: Status = "FAILED"
        with ExitStack() as stack:
            stack.callback(lambda: self.times.close(status=status))
            stack.callback(self.checkpoints.close)
            stack.callback(self.profile.close)
            loop = self._open_loop()
            self.checkpoints.start(self.state, checkpoint.step if checkpoint else None)
            if ranks.rank == 0:
                self._open_tracker()
                stack.callback(lambda: self.tracker.close(status))
            while self._run_stage(loop) and loop.step < num_steps(config) and not loop.stopping:
                self.watchdog.enter("start")
                self.learner.close()
                self._build(self.checkpoints.newest())
                self.checkpoints.prepare_for(self.state)
                loop = self._open_loop()
            status = "FINISHED" if loop.step == num_steps(config) else "KILLED"
        return outcome_at(config, loop.step)

    def _run_stage(self, loop: Loop) -> bool:
        """Train to the end of the stage, or until asked to stop, and save. Returns whether the stage ended."""
        loop.hooks = hooks = self._hooks()
        ended = self._train(loop)
        self.watchdog.enter("end")
        if ended:  # before the last checkpoint, which marks the stage as done
            is_final = loop.step >= num_steps(self.config)
            write_snapshot(self.stage.config, self.averaged, self.ranks, self.tracker, loop.step, is_final=is_final)
        self.checkpoints.save_last(lambda: hooks[-1].run(loop), loop.step)
        return ended

    def _open_loop(self) -> Loop:
        """The loop of the stage, at the step of the checkpoint."""
        loop = Loop(
            stage=self.stage,
            ranks=self.ranks,
            share=Share.of(self.stage.config, self.ranks.rank, self.ranks.world_size),
            learner=self.learner,
            batches=iter(()),
            driver=self.driver,
            watchdog=self.watchdog,
        )
        if self.checkpoint:
            self._load(loop, self.checkpoint)
        else:
            self._note_start(0)
        return loop

    def _hooks(self) -> tuple[Hook, ...]:
        """The hooks in the order in which they run; saving comes last."""
        config, tracker, checkpoint = self.stage.config, self.tracker, self.checkpoint
        curves = Curves(checkpoint.manifest.get("metrics", {}) if checkpoint else {})
        return (
            NoteTimes(self.times, self.profile),
            LogCurves(
                config.tracking.log_interval_steps,
                tracker,
                curves,
                self.checkpoints,
                self.replaced,
                self.monitor,
                self.driver,
            ),
            ReportStatus(self.driver, num_steps(self.config)),
            DrawGrid(config, self.averaged, tracker, self.index.class_names or ()),
            Evaluate(config, self.ranks, self.averaged, tracker, curves),
            SaveAverages(config, self.learner),
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

    def _load(self, loop: Loop, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint. A collective."""
        self.state.load(checkpoint, loop.statistics)
        self.checkpoints.forget_downloads()
        loop.step = checkpoint.step
        self._note_start(loop.step)

    def _note_start(self, step: int) -> None:
        self.times.resume(step)
        self.profile.begin(step)

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
        if checkpoint.step < self.stage.first_step:
            raise diverged.error(f"its last valid checkpoint is of an earlier stage, {checkpoint.path}")
        if self.ranks.rank == 0:
            log.warning("%s. Going back to step %d, %s", diverged, checkpoint.step, checkpoint.path)
        self._load(loop, checkpoint)

    def _open_batches(self, loop: Loop) -> BatchIterator:
        return open_share(self.stage.config, self.index, loop.share, loop.step, pin=self.ranks.device.type == "cuda")

    def _noted(self, batches: Iterable[Batch], loop: Loop) -> Iterator[Batch]:
        for batch in batches:
            loop.statistics.count_replaced(len(batch.replaced))
            self.replaced.note(batch.replaced)
            yield batch

    def close(self) -> None:
        """Finish a save in progress, and release lease and engines."""
        self.checkpoints.close()
        self.learner.close()
        self.times.close(status="FAILED")

    def _open_tracker(self) -> None:
        checkpoint, directory = self.checkpoint, Path(self.config.run.directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(text := shown_config(self.config), encoding="utf-8")
        if self.config.tracking.backends:
            self.tracker = open_tracker(
                self.config.tracking,
                directory,
                params=flat(self.config),
                config_yaml=text,
                tags=self.tags,
                run_name=directory.name,
                last_step=checkpoint.step if checkpoint else None,
                run_id=checkpoint.manifest.get("mlflow_run_id") if checkpoint else None,
            )


def prepare_torch(config: TrainConfig) -> None:
    """Set threads and determinism of this process; call it before anything is computed."""
    if config.scaling.device == "cpu":
        torch.set_num_threads(config.scaling.cpus_per_worker)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def run_rank(config: TrainConfig, driver: Driver, began: float | None = None) -> Outcome:
    """Join the group, train, leave the group.

    Args:
        config: of the run.
        driver: what started this process.
        began: when this start of the run began, in s since 1970; None: now.
    """
    began = time.time() if began is None else began
    prepare_torch(config)
    scaling, rank = config.scaling, int(os.environ.get("RANK", 0))
    directory = make_run_directory(config.run)
    with Watchdog(scaling.watchdog_s, allowance_s=scaling.timeout_s, rank=rank, directory=directory) as watchdog:
        ranks = Ranks.join(scaling.device, scaling.timeout_s)
        try:
            worker = Worker(config, ranks, driver, watchdog, began)
            try:
                return worker.run()
            finally:
                worker.close()
        finally:
            ranks.leave()
