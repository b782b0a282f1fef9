"""The training loop of one rank: read a batch, update each network, average, run the hooks that are due."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from data.stream.batches import Batch
from trainer.algorithm.method import Part
from trainer.algorithm.schedules import ema_decay, learning_rate, value_at
from trainer.config.stages import Stage
from trainer.config.train_config import TrainConfig
from trainer.engine.ranks import Agreement, Ranks
from trainer.rank.build import Learner
from trainer.rank.metrics import StatisticsSum, StepClock, peak_memory_gib
from trainer.rank.progress import Driver
from trainer.rank.step.inputs import Inputs
from trainer.rank.step.share import Share
from trainer.rank.step.updates import Updates
from trainer.rank.watchdog import Phase, Watchdog

log = logging.getLogger(__name__)


class Hook(Protocol):
    """Work between two steps. All ranks have the same hooks and run the same ones."""

    @property
    def phase(self) -> Phase:
        """The phase reported to the watchdog; `log` has no allowance for slow work."""
        ...

    def due(self, step: int, images: int, at_end: bool) -> bool:
        """Whether to run after `step` steps and `images` images of the run; at_end: it was the last step of a stage."""
        ...

    def run(self, loop: "Loop") -> None:
        """Do the work; called on every rank."""
        ...


@dataclass(kw_only=True)
class Loop:
    """Everything that one rank needs to train from `step` to the end of a stage.

    Attributes:
        stage, ranks: the stage of the run, and this process's place among the ranks.
        share: this rank's part of each global batch.
        learner: what the steps change.
        batches: this rank's micro-batches of uint8 images and labels in order, from batch `step` on.
        driver: can ask the run to stop.
        hooks: work after each step, in this order.
        watchdog: is told of each phase.
        method: the training method; the learner's, unless a benchmark replaces it.
        step: optimizer steps of the run that are done.
        statistics: sums since the last `take_metrics`.
        measured: the result of the last `take_metrics`; empty before the first.
        of_ranks: [R, 1 + K] float64: each rank's seconds per step and what it passed to the last `take_metrics`.
        stopping: the ranks have agreed to stop after the last step.
    """

    stage: Stage
    ranks: Ranks
    share: Share
    learner: Learner
    batches: Iterator[Batch]
    driver: Driver
    hooks: Sequence[Hook] = ()
    watchdog: Watchdog = field(default_factory=lambda: Watchdog(None))
    step: int = 0

    def __post_init__(self) -> None:
        self.method = self.learner.method
        self.statistics = StatisticsSum(self.learner.statistics)
        self.measured: dict[str, float] = {}
        self.of_ranks = torch.zeros(self.ranks.world_size, 0, dtype=torch.float64)
        self.stopping = False
        self._clock = StepClock(self.ranks.device)
        self._inputs = Inputs(self.config, self.share, self.learner.players, self.ranks.device)
        self._updates = Updates(self.learner.players, self.learner.recorder)

    @property
    def config(self) -> TrainConfig:
        """The settings of the stage."""
        return self.stage.config

    @property
    def images(self) -> int:
        """Training images of the run that all ranks have seen."""
        return self.step * self.share.global_batch_size

    @property
    def images_of_stage(self) -> int:
        """Those of the stage, by which its settings change."""
        return (self.step - self.stage.first_step) * self.share.global_batch_size

    def run(self, last: int | None = None) -> bool:
        """Train to the end of the stage, or until the ranks agree to stop.

        Args:
            last: the last step; None: that of the stage.

        Returns:
            Whether the last step was reached.

        Raises:
            Diverged: on all ranks after the same step, because too many updates in a row were skipped.
        """
        last, agreement = self.stage.last_step if last is None else last, Agreement(self.ranks)
        self._clock.start()
        while self.step < last:
            agreement.propose(self.driver.stop_requested())
            self._one_step()
            self.stopping = agreement.reached()
            self.watchdog.end_step()
            for hook in self.hooks:
                if hook.due(self.step, self.images, self.step == self.stage.last_step):
                    self.watchdog.enter(hook.phase)
                    hook.run(self)
            if self.stopping and self.step < last:
                log.info("asked to stop: step %d is done", self.step)
                return False
        return True

    def _one_step(self) -> None:
        players, clock, training = self.learner.players, self._clock, self.config.training
        seen = self.images_of_stage
        for part, engine in players.engines.items():
            engine.set_rates(self._learning_rate(part, seen), value_at(training.adam.beta2, seen))
        clock.mark("other")  # the hooks after the last step
        self.watchdog.enter("data")
        batches = [next(self.batches) for _ in range(self.share.num_micro_batches)]
        clock.mark("data")
        update = self._updates.of_step(self.method, self.step, self._inputs.load(batches, self.step))
        clock.mark("other")
        found = {}
        for part in self.method.parts:
            self.watchdog.enter(part)
            found[part] = update(part)
            clock.mark(part)
        for part, statistics in found.items():
            players.engines[part].finish()
            self.statistics.add(self.learner.skipped.take_in(part, players.engines[part].guard, statistics))
        self.learner.ema.update(
            self.step - self.stage.first_step,
            ema_decay(training.ema_decay, training.ema_half_life_images, seen, self.share.global_batch_size),
        )
        self.step += 1
        for state in players.running.values():
            state.end_step(self.step - self.stage.first_step)
        clock.end_step("other")

    def _learning_rate(self, part: Part, images: int) -> float:
        training = self.config.training
        schedule = training.learning_rate_g if part == "g" else training.learning_rate_d
        return learning_rate(schedule, images, training.total_images)

    def take_metrics(self, of_rank: Sequence[float] = ()) -> dict[str, float]:
        """The curves' values over the steps since the last call. A collective that waits for the device.

        Args:
            of_rank: values of this rank, as many on each, which all ranks get in `of_ranks`.
        """
        wall, split, timed = self._clock.take()
        self.of_ranks = torch.zeros(self.ranks.world_size, 1 + len(of_rank), dtype=torch.float64)
        self.of_ranks[self.ranks.rank] = torch.tensor([wall / max(1, timed), *of_rank], dtype=torch.float64)
        metrics = self.statistics.take(self.ranks, self.of_ranks)
        metrics |= {f"time/{part}_s": seconds / timed for part, seconds in split.items()}
        before, augmentation = self.images_of_stage - self.share.global_batch_size, self.config.training.augmentation
        for part, engine in self.learner.players.engines.items():
            metrics[f"gradient_norm_{part}"] = engine.guard.norm.item()
            metrics[f"learning_rate_{part}"] = self._learning_rate(part, before)
        if adaptive := self.learner.players.augmentation:
            metrics["augmentation_probability"] = adaptive.value.item()
        elif "d" in self.method.parts and augmentation.is_on:
            metrics["augmentation_probability"] = value_at(augmentation.probability, before)
        metrics |= {
            "images_seen": float(self.images),
            "images_per_s": timed * self.share.global_batch_size / wall,
            "peak_memory_gib": peak_memory_gib(self.ranks.device),
        }
        # The gradient norm of a skipped update may not be finite.
        self.measured = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return self.measured
