"""A run as a row of stages: each with its own config, and with the steps of the run that it makes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from trainer.config.draft import with_stage
from trainer.config.io import from_dict, to_dict
from trainer.config.train_config import LAST, TrainConfig, num_steps


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run with settings of its own.

    Steps, and images counted in them, are those of the run: they key the data, the random draws and the checkpoints.
    """

    name: str
    """As in the config; empty if the run has one stage only."""
    number: int
    """Counts from 1."""
    config: TrainConfig
    """Its settings, without stages; training.total_images are those of the stage."""
    first_step: int
    """Steps of the run that are done when it starts."""
    last_step: int
    """Steps of the run that are done when it ends."""


def only_stage(config: TrainConfig) -> Stage:
    """A run of one stage with the settings of the last one: what a config without its stages would be."""
    return Stage(name="", number=1, config=replace(config, stages={}), first_step=0, last_step=num_steps(config))


def stages_of(config: TrainConfig) -> tuple[Stage, ...]:
    """The stages of a run in their order; one, with the config itself, if the config names none."""
    return tuple(_stages(config)) if config.stages else (only_stage(config),)


def _stages(config: TrainConfig) -> Iterator[Stage]:
    values, batch = to_dict(config), config.training.global_batch_size
    images = first = 0
    for number, (name, stage) in enumerate(config.stages.items(), start=1):
        images += stage.images
        last = -(-images // batch)
        of_stage = _lasting(from_dict(with_stage(values, name)), (last - first) * batch)
        yield Stage(name=name, number=number, config=of_stage, first_step=first, last_step=last)
        first = last
    rest = _lasting(replace(config, stages={}), config.training.total_images - first * batch)
    yield Stage(name=LAST, number=len(config.stages) + 1, config=rest, first_step=first, last_step=num_steps(config))


def _lasting(config: TrainConfig, images: int) -> TrainConfig:
    return replace(config, training=replace(config.training, total_images=images))


def of_length(config: TrainConfig, total_images: int) -> list[str]:
    """Overrides that make a run of another length: all that training counts in images keeps its share of the run."""
    part = total_images / config.training.total_images

    def overrides(values: dict[str, Any], path: str) -> Iterator[str]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from overrides(value, f"{path}.{name}")
            elif value and name != "total_images" and (name.endswith("_images") or name == "images"):
                yield f"{path}.{name}={max(1, int(value * part))}"

    values = to_dict(config)
    found = [*overrides(values["training"], "training"), *overrides(values["stages"], "stages")]
    return [*found, f"training.total_images={total_images}"]


def stage_after(config: TrainConfig, step: int) -> Stage:
    """The stage that makes the step after `step`; the last one if the run is over."""
    stages = stages_of(config)
    return next((stage for stage in stages if step < stage.last_step), stages[-1])


def stage_before(config: TrainConfig, step: int) -> Stage:
    """The stage that made `step`, and wrote what the run saved after it; the first one before any step."""
    return next(stage for stage in reversed(stages_of(config)) if step > stage.first_step or stage.number == 1)
