"""What is measured of a config: each stage of its run, shortened to some steps, for the ranks at hand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.config.command_line import check_group
from trainer.config.io import load_config
from trainer.config.sections import LearningRateConfig
from trainer.config.stages import stages_of
from trainer.config.train_config import TrainConfig
from trainer.rank.step.graphs import WARM_UP
from trainer.rank.step.share import Share


@dataclass(frozen=True, kw_only=True)
class MeasuredPart:
    """A stage of a run, as it is measured.

    Attributes:
        name: that of the stage; empty if the run has one only.
        share: of the run's images, in (0, 1].
        config: without stages; its training.total_images are those that are measured.
    """

    name: str
    share: float
    config: TrainConfig


def measured_parts(
    name: str, overrides: Sequence[str], folder: Path, steps: int | None, rounds: int
) -> list[MeasuredPart]:
    """The stages of a run in their order, for the ranks that torchrun started, or for one, which then has the same
    share of the global batch as with all ranks. They start from new weights without warm-up or delay, and save nothing.

    Args:
        name: name or file of the config.
        overrides: those of the user.
        folder: for the run.
        steps: steps between two points of the curves; None: `steps_of_round` of the stage.
        rounds: points of the curves.

    Raises:
        ConfigError: the config is wrong.
    """
    _, ranks = check_group()
    whole = load_config(name, [*overrides, *([f"scaling.world_size={ranks}"] if ranks > 1 else [])])
    images = whole.training.total_images
    return [
        MeasuredPart(
            name=stage.name,
            share=stage.config.training.total_images / images if whole.stages else 1.0,
            config=_shortened(stage.config, folder, ranks, steps or steps_of_round(stage.config), rounds),
        )
        for stage in stages_of(whole)
    ]


def _shortened(config: TrainConfig, folder: Path, ranks: int, steps: int, rounds: int) -> TrainConfig:
    share = Share.of(config, 0, config.scaling.world_size)
    training = config.training
    batch = training.global_batch_size if ranks > 1 else share.stop - share.start

    def at_once(rate: LearningRateConfig) -> LearningRateConfig:
        return replace(rate, warmup_images=0, delay_images=0)

    return replace(
        config,
        run=replace(config.run, directory=str(folder), init_from=None),
        training=replace(
            training,
            total_images=batch * steps * rounds,
            global_batch_size=batch,
            micro_batch_size=share.micro_batch_size,
            learning_rate_g=at_once(training.learning_rate_g),
            learning_rate_d=at_once(training.learning_rate_d),
        ),
        scaling=replace(config.scaling, world_size=ranks, min_world_size=None),
        checkpoint=replace(config.checkpoint, keep_best=None),
        tracking=replace(config.tracking, backends=(), register_as=None, log_interval_steps=steps),
    )


def steps_of_round(config: TrainConfig) -> int:
    """Whole intervals of R1, for its real frequency; with CUDA graphs so many that the first round records them."""
    interval = config.training.r1_interval_steps or 1
    without_penalties = max(1, interval - 1)
    return interval * (-(-(WARM_UP + 1) // without_penalties) if config.engine.cuda_graphs else 1)
