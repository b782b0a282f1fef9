"""The loop of one rank: read, update D, update G, average; now and then log, draw a grid, save; stop when asked."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from data.stream.batches import Batch
from trainer.algorithm.ema import Ema
from trainer.algorithm.pairs import Labels, draw_micro_batch
from trainer.algorithm.randomness import Draws
from trainer.algorithm.regression import draw_noisy_batch, update_denoiser
from trainer.algorithm.schedules import learning_rate
from trainer.algorithm.step import Players, Statistics, update_discriminator, update_generator
from trainer.config.train_config import TrainConfig, num_steps, split_batch
from trainer.engine.ranks import Agreement, Ranks
from trainer.evaluate.during_training import is_due
from trainer.rank.divergence import SkippedUpdates
from trainer.rank.metrics import StatisticsSum, StepClock, peak_memory_gib
from trainer.rank.progress import Driver, Status
from trainer.rank.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """This rank's part of each global batch.

    Attributes:
        start, stop: positions in the global batch.
        micro_batch_size: most images of one forward pass.
        global_batch_size: images of all ranks.
        grad_accum_steps: forward passes of one update, the same on all ranks.
        group_size: images that a forward pass takes whole.
    """

    start: int
    stop: int
    micro_batch_size: int
    global_batch_size: int
    grad_accum_steps: int
    group_size: int

    @classmethod
    def of(cls, config: TrainConfig, rank: int, world_size: int) -> "Share":
        """The contiguous share of `rank`."""
        split = split_batch(config)
        assert split.world_size == world_size, f"{world_size} ranks started, the config plans {split.world_size}"
        return cls(
            *split.share(rank),
            split.micro_batch_size,
            split.global_batch_size,
            split.grad_accum_steps,
            split.group_size,
        )

    @property
    def num_micro_batches(self) -> int:
        """Forward passes that have images of their own; at most one less than grad_accum_steps."""
        return -(-(self.stop - self.start) // self.micro_batch_size)


@dataclass
class Loop:
    """Everything that one rank needs to go from `step` to the end.

    Attributes:
        players, ema: networks and the average.
        batches: this rank's micro-batches of uint8 images and labels in order, from batch `step` on.
        step: optimizer steps done.
        statistics: sums since the last log point.
        skipped: follows the updates that were skipped.
        watchdog: hears of each phase.
        on_log: called on every rank with step and metrics.
        on_sample: called on every rank when a grid is due.
        on_save: called on every rank when a checkpoint is due.
        on_evaluate: called on every rank when an evaluation is due, before a checkpoint.
        update_d: the update of the discriminator; a benchmark compares it with another.
    """

    config: TrainConfig
    ranks: Ranks
    share: Share
    players: Players
    ema: Ema
    batches: Iterator[Batch]
    driver: Driver
    on_log: Callable[[int, dict[str, float]], None]
    on_sample: Callable[[int], None]
    on_save: Callable[[int], None]
    on_evaluate: Callable[[int], None] = lambda _step: None
    update_d: Callable[..., Statistics] = update_discriminator
    step: int = 0
    statistics: StatisticsSum = field(default_factory=StatisticsSum)
    skipped: SkippedUpdates = field(kw_only=True)
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(None))

    def __post_init__(self) -> None:
        self._status = Status(step=self.step, images=self._images(), total_images=self._images(num_steps(self.config)))

    def resume_at(self, step: int) -> None:
        """Go on after `step` optimizer steps."""
        self.step = step
        self._status = Status(step=step, images=self._images(), total_images=self._status.total_images)

    def _images(self, step: int | None = None) -> int:
        return (self.step if step is None else step) * self.share.global_batch_size

    def run(self) -> bool:
        """Go to the planned end, or to the step after which the ranks agree to stop.

        Returns:
            Whether the planned end was reached.

        Raises:
            Diverged: on all ranks after the same step, because too many updates in a row were skipped.
        """
        last, agreement, clock = num_steps(self.config), Agreement(self.ranks), StepClock(self.ranks.device)
        while self.step < last:
            agreement.propose(self.driver.stop_requested())
            self._one_step(clock)
            stopping = agreement.reached()
            self.watchdog.end_step()
            self._after_step(clock, at_end=self.step == last)
            if stopping and self.step < last:
                log.info("asked to stop: step %d is done", self.step)
                return False
        return True

    def _one_step(self, clock: StepClock) -> None:
        training, step = self.config.training, self.step
        penalized = step % (training.r1_interval_steps or 1) == 0
        for engine, schedule in (
            (self.players.discriminator, training.learning_rate_d),
            (self.players.generator, training.learning_rate_g),
        ):
            engine.set_learning_rate(learning_rate(schedule, self._images(), training.total_images))

        clock.mark("other")  # logging, grids and checkpoints since the last step
        self.watchdog.enter("data")
        batches = [next(self.batches) for _ in range(self.share.num_micro_batches)]
        clock.mark("data")
        micro_batches = [self._micro_batch(x.images, x.labels, i, len(x.images)) for i, x in enumerate(batches)]
        # Every rank must come to each reduction: one with fewer images repeats some, with no weight.
        if missing := self.share.grad_accum_steps - len(batches):
            images, labels = (part[: self.share.group_size] for part in batches[0][:2])
            micro_batches += [self._micro_batch(images, labels, 0, 0)] * missing
        clock.mark("other")
        if training.objective == "gaussian":
            self.watchdog.enter("g")
            statistics = update_denoiser(self.players, micro_batches, training.prediction)
        else:
            self.watchdog.enter("d")
            statistics = self.update_d(
                self.players,
                micro_batches,
                with_r1=penalized and training.r1_gamma > 0,
                with_r2=penalized and training.r2_gamma > 0,
            )
            self.statistics.add(self.skipped.take_in("d", self.players.discriminator.guard, statistics))
            clock.mark("d")
            self.watchdog.enter("g")
            statistics = update_generator(self.players, micro_batches)
        self.statistics.add(self.skipped.take_in("g", self.players.generator.guard, statistics))
        clock.mark("g")
        self.ema.update(step)
        self.step += 1
        clock.end_step("other")

    def _micro_batch(self, images: Tensor, labels: Tensor, index: int, weight: int) -> Any:
        """What the objective's updates see of some images: a MicroBatch, or a NoisyBatch without a discriminator."""
        first = self.share.start + index * self.share.micro_batch_size
        samples = torch.arange(first, first + len(images), device=self.ranks.device)
        num_classes, device = self.config.data.num_classes, self.ranks.device
        classes = None
        if num_classes:
            of_images = labels.to(device, non_blocking=True)
            classes = Labels(of_images, num_classes, self.config.training.label_dropout)
        draw = draw_noisy_batch if self.config.training.objective == "gaussian" else draw_micro_batch
        return draw(
            images.to(self.ranks.device, non_blocking=True),
            Draws(self.config.run.seed, self.step, samples),
            self.players.diffusion,
            latent_dim=self.config.generator.latent_dim,
            flip=self.config.data.horizontal_flip,
            share=weight / self.share.global_batch_size,
            labels=classes,
        )

    def _after_step(self, clock: StepClock, *, at_end: bool) -> None:
        """What is due after a step. Every rank decides the same, from the step alone."""
        tracking, save_every = self.config.tracking, self.config.checkpoint.save_interval_steps
        losses, rate = self._status.losses, self._status.images_per_s
        if at_end or self.step % tracking.log_interval_steps == 0:
            metrics = self._measure(clock)
            losses = {name: value for name, value in metrics.items() if name.startswith("loss_")}
            rate = metrics["images_per_s"]
            self.on_log(self.step, metrics)
            self.skipped.check(self.step, self.ranks)
        self._status = Status(self.step, self._images(), self._status.total_images, rate, losses)
        if self.ranks.rank == 0:
            self.driver.report(self._status)
        if at_end or (self.config.grids.interval_steps and self.step % self.config.grids.interval_steps == 0):
            self.watchdog.enter("sampling")
            self.on_sample(self.step)
        if is_due(self._images(), self.share.global_batch_size, self.config.evaluation.interval_images):
            self.watchdog.enter("sampling")
            self.on_evaluate(self.step)
        if save_every and self.step % save_every == 0 and not at_end:  # the caller saves the end, and a stop
            self.watchdog.enter("checkpoint")
            self.on_save(self.step)

    def _measure(self, clock: StepClock) -> dict[str, float]:
        training = self.config.training
        metrics = self.statistics.take(self.ranks)
        wall, split, timed = clock.take()
        before = (self.step - 1) * self.share.global_batch_size
        metrics |= {f"time/{part}_s": seconds / timed for part, seconds in split.items()}
        if training.objective != "gaussian":
            metrics |= {
                "gradient_norm_d": self.players.discriminator.guard.norm.item(),
                "learning_rate_d": learning_rate(training.learning_rate_d, before, training.total_images),
            }
        metrics |= {
            "gradient_norm_g": self.players.generator.guard.norm.item(),
            "learning_rate_g": learning_rate(training.learning_rate_g, before, training.total_images),
            "images_seen": float(self._images()),
            "images_per_s": timed * self.share.global_batch_size / wall,
            "peak_memory_gib": peak_memory_gib(self.ranks.device),
        }
        # The gradient norm of an update that was skipped need not be a number.
        return {name: value for name, value in metrics.items() if math.isfinite(value)}
