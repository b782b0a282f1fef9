"""What a run does between steps: log curves, report to the driver, draw grids, evaluate and save checkpoints."""

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from data.storage.location import DataError
from trainer.algorithm.ema import power_name
from trainer.checkpoint.snapshot import averages_folder, build_generator, save_average, save_snapshot
from trainer.config.sections import FIGURES
from trainer.config.train_config import TrainConfig
from trainer.engine.ranks import Ranks
from trainer.evaluate.during_training import RunEvaluation, is_due
from trainer.rank.build import Learner
from trainer.rank.divergence import LogitGap
from trainer.rank.loop import Loop
from trainer.rank.progress import Driver, RunStatus
from trainer.rank.replaced import ReplacedSamples
from trainer.rank.run_checkpoints import RunCheckpoints
from trainer.rank.state import TrainingState
from trainer.rank.watchdog import Phase
from trainer.sample.conditions import GRID_COLUMNS, draw_translations
from trainer.sample.draw import sample_images
from trainer.sample.images import save_grid
from trainer.timing.profile import StepProfile
from trainer.timing.time_sheet import TimeSheet
from trainer.tracking.system import SystemMonitor, system_curves
from trainer.tracking.tracker import Tracker

log = logging.getLogger(__name__)


class Curves:
    """The newest values of the curves, which checkpoints keep.

    Attributes:
        metrics: values at the last log point.
    """

    def __init__(self, metrics: dict[str, float]) -> None:
        """Start with the metrics of the checkpoint from which the run resumes."""
        self.metrics = {name: value for name, value in metrics.items() if name not in FIGURES}
        self._figures: tuple[int, dict[str, float]] = (0, {})

    def note_figures(self, step: int, figures: dict[str, float]) -> None:
        """Record the evaluation of the weights after `step`; it is valid for these weights only."""
        self._figures = step, figures

    def after(self, step: int) -> dict[str, float]:
        """The newest metrics, and the evaluation of the weights after `step` if there is one."""
        return self.metrics | (self._figures[1] if self._figures[0] == step else {})


class AveragedGenerator:
    """A separate generator that holds the averaged weights, for sampling."""

    def __init__(self, config: TrainConfig, ranks: Ranks, learner: Learner) -> None:
        """Build it on the ranks that sample: rank 0, and all ranks if the run is evaluated during training."""
        self._learner = learner
        samples = ranks.rank == 0 or config.evaluation.interval_images is not None
        self._network = build_generator(config, ranks.device).eval().requires_grad_(False) if samples else None

    def filled(self) -> nn.Module | None:
        """The generator with the current average, or None on a rank that does not sample. A collective."""
        state = self._learner.averaged_generator()
        if self._network is not None:
            self._network.load_state_dict(state)
        return self._network


class LogCurves:
    """Logs means since the last log point, and checks whether updates were skipped and whether D learns."""

    phase: Phase = "log"

    def __init__(
        self,
        interval_steps: int,
        tracker: Tracker,
        curves: Curves,
        checkpoints: RunCheckpoints,
        replaced: ReplacedSamples,
        monitor: SystemMonitor,
        driver: Driver,
    ) -> None:
        self._interval_steps, self._tracker, self._curves, self._driver = interval_steps, tracker, curves, driver
        self._checkpoints, self._replaced, self._monitor = checkpoints, replaced, monitor
        self._logit_gap = LogitGap()

    def due(self, step: int, images: int, at_end: bool) -> bool:
        """Every `interval_steps` steps, and at the end."""
        return at_end or step % self._interval_steps == 0

    def run(self, loop: Loop) -> None:
        """Measure and log. Raises Diverged, on all ranks or on none."""
        metrics = self._curves.metrics = loop.take_metrics(self._monitor.measure())
        saves = {f"checkpoint/{name}": seconds for name, seconds in self._checkpoints.take_times().items()}
        failures = {"checkpoint_failures": float(self._checkpoints.take_failures())}
        values = metrics | failures | saves | machine_curves(loop.of_ranks)
        self._tracker.log_metrics(loop.step, values)
        if metrics["replaced_samples"]:  # a sum over the ranks, so all of them call the collective
            self._replaced.publish(self._tracker)
        if loop.ranks.rank == 0:
            self._driver.show(values)
            self._logit_gap.check(loop.step - loop.stage.first_step, metrics)
        loop.learner.skipped.check(loop.step, loop.ranks)


def machine_curves(of_ranks: Tensor) -> dict[str, float]:
    """Curves of the machines: mean and longest step time of the ranks, and whose that is; then `system_curves`.

    Args:
        of_ranks: [R, 1 + K], as the loop has it: each rank's seconds per step, and what its monitor measured.
    """
    seconds, measured = of_ranks[:, 0], of_ranks[:, 1:].tolist()
    return {
        "step_time_s": seconds.mean().item(),
        "step_time_slowest_s": seconds.max().item(),
        "step_time_slowest_rank": float(seconds.argmax()),
        **system_curves(measured),
    }


class ReportStatus:
    """Reports the run's progress to the driver after every step."""

    phase: Phase = "log"

    def __init__(self, driver: Driver, num_steps: int) -> None:
        """Args:
        num_steps: steps of the whole run.
        """
        self._driver, self._num_steps = driver, num_steps

    def due(self, step: int, images: int, at_end: bool) -> bool:
        """After every step."""
        return True

    def run(self, loop: Loop) -> None:
        """Report, from rank 0."""
        if loop.ranks.rank != 0:
            return
        losses = {name: value for name, value in loop.measured.items() if name.startswith("loss_")}
        rate, total = loop.measured.get("images_per_s", 0.0), self._num_steps * loop.share.global_batch_size
        self._driver.report(RunStatus(loop.step, loop.images, total, rate, losses))


class NoteTimes:
    """Tells the time sheet and the profile of this rank that a step is done."""

    phase: Phase = "log"

    def __init__(self, times: TimeSheet, profile: StepProfile) -> None:
        self._times, self._profile = times, profile

    def due(self, step: int, images: int, at_end: bool) -> bool:
        """After every step."""
        return True

    def run(self, loop: Loop) -> None:
        """Note it; after the last step of the profile, write that."""
        self._times.end_step(loop.step)
        self._profile.end_step()
        if self._profile.last == loop.step:
            loop.watchdog.enter("profile")
            self._profile.close()


class DrawGrid:
    """Draws a grid of samples with the averaged weights, always from the same noise; with classes, a row for each.

    A model that translates gets a row for each of the first pairs of the data set, see `draw_translations`.
    """

    phase: Phase = "sampling"

    def __init__(
        self, config: TrainConfig, averaged: AveragedGenerator, tracker: Tracker, class_names: Sequence[str]
    ) -> None:
        """Args:
        class_names: names of the classes of the data set; empty without classes.
        """
        self._config, self._averaged, self._tracker = config, averaged, tracker
        # More rows than images would show some classes only.
        translates = config.data.condition_channels > 0
        fits = not translates and config.data.num_classes and len(class_names) <= config.grids.num_images
        self._rows = tuple(class_names) if fits else ()
        self._interval_steps = config.grids.interval_steps

    def due(self, step: int, images: int, at_end: bool) -> bool:
        """At its interval of steps, and at the end."""
        return at_end or bool(self._interval_steps and step % self._interval_steps == 0)

    def run(self, loop: Loop) -> None:
        """Draw, on rank 0."""
        generator, config = self._averaged.filled(), self._config
        if generator is None or loop.ranks.rank != 0:
            return
        num = config.grids.num_images
        if self._rows:
            num -= num % len(self._rows)
        diffusion, file = loop.learner.players.diffusion, Path(config.run.directory) / "samples"
        file /= f"step-{loop.step:08d}.png"
        try:
            if config.data.condition_channels:
                images, columns = draw_translations(generator, diffusion, config, num=num), GRID_COLUMNS
            else:
                images, columns = sample_images(generator, diffusion, config, num=num, seed=0), None
            save_grid(file, images, self._rows, columns)
        except (OSError, DataError) as error:
            # A full disk, or pairs that are gone; any other error ends the run.
            log.error("the grid of step %d was not saved, training continues: %s", loop.step, error)
            return
        self._tracker.log_image(loop.step, "samples", file)


class Evaluate:
    """Evaluates the averaged weights, before the step's checkpoint is saved."""

    phase: Phase = "sampling"

    def __init__(
        self, config: TrainConfig, ranks: Ranks, averaged: AveragedGenerator, tracker: Tracker, curves: Curves
    ) -> None:
        self._averaged, self._tracker, self._curves = averaged, tracker, curves
        self._step_images, self._interval = config.training.global_batch_size, config.evaluation.interval_images
        self._evaluation = RunEvaluation(config, ranks)

    def due(self, step: int, images: int, at_end: bool) -> bool:
        """Every evaluation.interval_images images."""
        return is_due(images, self._step_images, self._interval)

    def run(self, loop: Loop) -> None:
        """Evaluate, on all ranks."""
        generator = self._averaged.filled()
        assert generator is not None
        figures = self._evaluation.figures(generator, loop.learner.players.diffusion)
        self._curves.note_figures(loop.step, figures)
        self._tracker.log_metrics(loop.step, figures)


class SaveAverages:
    """Writes the averages by power functions to the run directory, for `trainer.average`."""

    phase: Phase = "checkpoint"

    def __init__(self, config: TrainConfig, learner: Learner) -> None:
        self._config, self._learner = config, learner
        settings, images = config.training.power_ema, config.training.total_images
        self._widths, self._interval = settings.widths, settings.interval_images or -(-images // 32)
        self._step_images = config.training.global_batch_size

    def due(self, step: int, images: int, at_end: bool) -> bool:
        """Every interval of images, and at the end, if there are such averages."""
        return bool(self._widths) and (at_end or is_due(images, self._step_images, self._interval))

    def run(self, loop: Loop) -> None:
        """Write them, on rank 0. A collective."""
        folder = averages_folder(Path(self._config.run.directory)) / f"step-{loop.step:08d}"
        for width in self._widths:
            state = self._learner.averaged_generator(power_name(width))
            if loop.ranks.rank != 0:
                continue
            try:
                save_average(folder, state, self._config, width, first_step=loop.stage.first_step, step=loop.step)
            except OSError as error:  # a full disk; the checkpoint has its own rules
                log.error("the averages of step %d were not written, training continues: %s", loop.step, error)


class SaveCheckpoint:
    """Starts saving the state; it is written while the following steps run."""

    phase: Phase = "checkpoint"

    def __init__(
        self,
        interval_steps: int | None,
        checkpoints: RunCheckpoints,
        state: TrainingState,
        tracker: Tracker,
        curves: Curves,
        replaced: ReplacedSamples,
    ) -> None:
        self._interval_steps, self._checkpoints, self._state = interval_steps, checkpoints, state
        self._tracker, self._curves, self._replaced = tracker, curves, replaced

    def due(self, step: int, images: int, at_end: bool) -> bool:
        """Every `interval_steps` steps, but not at the end or at a stop: the loop's caller saves then."""
        return bool(self._interval_steps and step % self._interval_steps == 0) and not at_end

    def run(self, loop: Loop) -> None:
        """Start saving."""
        self._replaced.publish(self._tracker)  # a run that resumes from here will not read these samples again
        self._checkpoints.note(self._curves.after(loop.step))
        self._checkpoints.save(self._state, loop.statistics, loop.step, self._tracker.run_id)


def write_snapshot(
    config: TrainConfig, averaged: AveragedGenerator, ranks: Ranks, tracker: Tracker, step: int, *, is_final: bool
) -> None:
    """Write the averaged generator and its config at the end of a stage. A collective.

    Args:
        config: of the stage.
        averaged: the generator.
        ranks: the group.
        tracker: gets the files.
        step: of the run.
        is_final: it is the end of the run; with tracking.register_as the snapshot is registered.
    """
    generator = averaged.filled()
    if generator is None or ranks.rank != 0:
        return
    folder = Path(config.run.directory) / "snapshots" / f"step-{step:08d}"
    save_snapshot(folder, generator.state_dict(), config, step)
    *files, last = sorted(folder.iterdir())
    for file in files:
        tracker.log_artifact(file, "snapshot")
    tracker.log_artifact(last, "snapshot", config.tracking.register_as if is_final else None)
