"""All sections of a run's settings together, and the rules across them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch import nn

from data.stream.pipeline import DataConfig
from models.diffusion import Diffusion, DiffusionConfig
from models.discriminator import DiscriminatorConfig, check_image_size
from models.generator import GeneratorConfig
from models.networks.build import build_discriminator, build_generator, shared_with_encoder, without_values
from models.shapes import ImageForm
from models.wavelets import form_in
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.method import PART_NAMES
from trainer.algorithm.methods import make_method
from trainer.config.batch_split import BatchSplit, split_evenly, split_groups
from trainer.config.sections import (
    FIGURES,
    RENAMED_FIGURES,
    CheckpointConfig,
    EvaluationConfig,
    GridsConfig,
    GuardConfig,
    RunConfig,
    ScalingConfig,
    StageConfig,
    TrackingConfig,
    TrainingConfig,
)
from trainer.engine.frozen import matches
from trainer.engine.interface import EngineConfig
from trainer.engine.precision import Precision, best_precision


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run, by sections; the docstring of each class says what its section is for."""

    run: RunConfig
    data: DataConfig
    training: TrainingConfig
    stages: dict[str, StageConfig] = field(default_factory=dict)
    """Stages before the one that the rest of the config describes, by name, in their order. Each starts from the
    averaged generator of the one before, with a new discriminator and new optimizers. What is counted in images or
    steps within a setting, such as decay_images, counts from the start of its stage."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    grids: GridsConfig = field(default_factory=GridsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Check the rules that need more than one section; every broken rule is a line of one ValueError."""
        problems: list[str] = []
        rules = (split_batch, _check_method, _check_keep_best, _check_warmup, _check_networks, _check_zero)
        for rule in (*rules, _check_stages, _check_registered):
            try:
                rule(self)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        _check_elastic(self)  # last: it needs a batch that world_size can split

    @property
    def image_form(self) -> ImageForm:
        """Size, channels and classes of the images."""
        data = self.data
        return ImageForm(data.image_size, data.image_channels, data.num_classes, data.condition_channels)

    @property
    def network_form(self) -> ImageForm:
        """The same of what the networks see, which is diffused: pixels or wavelet coefficients."""
        return form_in(self.image_form, self.data.domain)

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """Sigma of the input of each step, 0 .. T-1."""
        return _noise_levels(self.diffusion)


@cache
def _noise_levels(diffusion: DiffusionConfig) -> tuple[float, ...]:
    return tuple(Diffusion.from_config(diffusion).noise_levels.tolist())


def split_batch(config: TrainConfig, world_size: int | None = None) -> BatchSplit:
    """Spread the global batch over ranks and micro-batches.

    Args:
        config: the run.
        world_size: number of ranks; None: scaling.world_size.

    Raises:
        ValueError: It cannot be spread; the message shows the arithmetic.
    """
    training, discriminator = config.training, config.discriminator
    sizes = (training.global_batch_size, world_size or config.scaling.world_size, training.micro_batch_size)
    if discriminator.stddev_grouping == "strided":
        return split_evenly(*sizes, discriminator.stddev_group_size)
    return split_groups(*sizes, discriminator.stddev_group_size)


def _check_elastic(config: TrainConfig) -> None:
    """Each number of ranks that the run may shrink to must be able to split the batch."""
    scaling = config.scaling
    for world_size in range(scaling.min_world_size or scaling.world_size, scaling.world_size):
        try:
            fewer = split_batch(config, world_size)
            if config.discriminator.stddev_grouping == "strided":
                _check_same_micro_batch(fewer, split_batch(config))
        except ValueError as error:
            raise ValueError(
                f"scaling.min_world_size is {scaling.min_world_size} and scaling.world_size {scaling.world_size}: the "
                f"run may come to {world_size} ranks, but {error}"
            ) from None


def _check_same_micro_batch(fewer: BatchSplit, planned: BatchSplit) -> None:
    """Strided groups are those of a micro-batch: another micro-batch size would compare other images."""
    if fewer.micro_batch_size != planned.micro_batch_size:
        raise ValueError(
            f"with discriminator.stddev_grouping strided the images of a forward pass may not change, from "
            f"{planned.micro_batch_size} to {fewer.micro_batch_size}. Set training.micro_batch_size to "
            f"{planned.micro_batch_size}, or stddev_grouping contiguous"
        )


def _check_method(config: TrainConfig) -> None:
    training = config.training
    if training.label_dropout and not config.data.num_classes:
        raise ValueError(
            f"training.label_dropout is {training.label_dropout:g}, but data.num_classes is 0, so that there are no "
            "labels to drop: set data.num_classes to that of the data set, or training.label_dropout to 0"
        )
    if training.condition_dropout and not config.data.condition_channels:
        raise ValueError(
            f"training.condition_dropout is {training.condition_dropout:g}, but data.condition_channels is 0, so that "
            "there is nothing to drop: set data.condition_channels to that of the data set, or condition_dropout "
            "to 0"
        )
    if training.augmentation.is_on and config.discriminator.kind == "mlp":
        raise ValueError(
            "training.augmentation moves and hides pixels of images, but discriminator.kind is mlp, which judges "
            "points: set training.augmentation.probability to 0, or discriminator.kind to small or large"
        )
    if config.data.domain == "haar" and training.augmentation.is_on and "flip" in training.augmentation.transforms:
        raise ValueError(
            "training.augmentation.transforms holds flip, but data.domain is haar, some of whose coefficients change "
            "their sign when an image is mirrored: leave flip out; data.horizontal_flip mirrors the images themselves"
        )
    method = make_method(training, config.generator)
    if isinstance(method, Adversarial):
        _check_predictions(config, method)


def _check_predictions(config: TrainConfig, game: Adversarial) -> None:
    """The discriminator predicts what losses with a weight compare, and nothing else, which would not be trained."""
    predicts, loss_of = config.discriminator.predicts, {"x0": "denoising", "x_t": "afd"}
    for name, loss in loss_of.items():
        if name in predicts and name not in game.auxiliary.predicts:
            others = ", ".join(other for other in predicts if other != name)
            raise ValueError(
                f"discriminator.predicts holds {name}, but training.{loss} is 0, so that it would not be trained: set "
                f"training.{loss} above 0, or discriminator.predicts to [{others}]"
            )
        if name in game.auxiliary.predicts and name not in predicts:
            raise ValueError(
                f"training.{loss} has a weight, but the discriminator does not predict {name}: set "
                f"discriminator.predicts to [{', '.join((*predicts, name))}], or training.{loss} to 0"
            )
    if "x_t" in predicts and config.discriminator.sees == "pair":
        raise ValueError(
            "training.afd compares x_t with the discriminator's prediction of it, but discriminator.sees is pair, with "
            "which it is given x_t: set discriminator.sees to marginal, or training.afd to 0"
        )


def _check_keep_best(config: TrainConfig) -> None:
    """A figure must exist when a checkpoint is saved: the figure of other weights does not describe these."""
    best, every = config.checkpoint.keep_best, config.evaluation.interval_images
    if best not in FIGURES:
        return
    network = config.evaluation.network
    figure = next((name for names in RENAMED_FIGURES.values() for name, new in names.items() if new == best), best)
    measured = RENAMED_FIGURES.get(network or "", {}).get(figure, figure)
    if best != measured:
        raise ValueError(
            f"checkpoint.keep_best is {best}, which evaluation.network {network or 'null'} does not measure: set it to "
            f"{measured}"
        )
    if every is None:
        raise ValueError(
            f"checkpoint.keep_best is {best}, which an evaluation measures, but evaluation.interval_images is null: "
            "set it, or keep the best by another curve"
        )
    batch, steps = config.training.global_batch_size, config.checkpoint.save_interval_steps
    if every % batch or (steps and steps * batch % every):
        raise ValueError(
            f"checkpoint.keep_best is {best}, so each checkpoint needs an evaluation of the same step, but a "
            f"checkpoint comes every {steps} x {batch} images and an evaluation every {every}: make "
            f"evaluation.interval_images a multiple of training.global_batch_size ({batch}) that divides the images "
            "between checkpoints"
        )


def _check_warmup(config: TrainConfig) -> None:
    total_images = config.training.total_images
    for name in ("learning_rate_g", "learning_rate_d"):
        schedule = getattr(config.training, name)
        if schedule.warmup_images + schedule.delay_images >= total_images:
            delayed = f" and delay_images ({schedule.delay_images}) together" if schedule.delay_images else ""
            raise ValueError(
                f"training.{name}.warmup_images ({schedule.warmup_images}){delayed} must be less than "
                f"training.total_images ({total_images}), or the rate never reaches its peak"
            )


def _check_networks(config: TrainConfig) -> None:
    form = config.network_form
    size, seen = form.size, "data.image_size" if config.data.domain == "pixels" else "the size of the Haar coefficients"
    problems = [_build_problem(config.generator, form, config.noise_levels)]
    try:
        if config.discriminator.kind != "mlp":
            check_image_size(config.discriminator, size)
    except ValueError as error:
        problems.append(f"discriminator.kind is {config.discriminator.kind}: {error}")
    if config.discriminator.kind == "small" and size > 64:
        problems.append(
            f"discriminator.kind is small: it halves {seen} {size} only 3 times, so none of its outputs sees "
            "the whole image; it is for images up to 64 pixels. Use kind large"
        )
    if any(problems):
        raise ValueError("\n".join(filter(None, problems)))
    _check_freeze(config)
    _check_discriminator_start(config)


def _check_freeze(config: TrainConfig) -> None:
    if not (patterns := config.training.freeze):
        return
    names = [
        f"{PART_NAMES[part]}.{name}"
        for part, network in zip(("g", "d"), _on_meta(config), strict=True)
        for name, _ in network.named_parameters()
    ]
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            begun, following = _where_names_differ(pattern, names)
            raise ValueError(
                f"training.freeze holds {pattern}, which fits no parameter: names begin with {begun}"
                f"{begun and ' and go on with '}{', '.join(following)}. A pattern of all that is below one of these "
                "ends with .*"
            )
    for part in PART_NAMES.values():
        if all(matches(name, patterns) for name in names if name.startswith(f"{part}.")):
            raise ValueError(
                f"training.freeze holds {', '.join(patterns)}, which is the whole {part}, so that it would learn "
                "nothing: leave out what shall learn"
            )


def _check_discriminator_start(config: TrainConfig) -> None:
    if config.discriminator.init_from is None:
        return
    if "mlp" in (config.generator.kind, config.discriminator.kind):
        raise ValueError(
            "discriminator.init_from is generator, but a network of kind mlp has no convolutions: set "
            "discriminator.init_from to null"
        )
    if config.discriminator.kind == "resnext":
        raise ValueError(
            "discriminator.init_from is generator, but discriminator.kind is resnext, whose blocks are of another kind "
            "than those of the generator: set discriminator.init_from to null, or discriminator.kind to small or large"
        )
    generator, discriminator = _on_meta(config)
    if not shared_with_encoder(discriminator, generator):
        base, multipliers = config.generator.base_channels, sorted(set(config.generator.channel_multipliers))
        raise ValueError(
            "discriminator.init_from is generator, but none of its convolutions has the shape of one in the encoder of "
            "the generator: set discriminator.base_channels so that 8 times it is a width of the generator, which are "
            f"{', '.join(str(base * multiplier) for multiplier in multipliers)}, or discriminator.init_from to null"
        )


def _on_meta(config: TrainConfig) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator of a config, without values."""
    with without_values():
        return (
            build_generator(config.generator, config.network_form, config.noise_levels),
            build_discriminator(config.discriminator, config.network_form),
        )


def _where_names_differ(pattern: str, names: Sequence[str]) -> tuple[str, list[str]]:
    """How far a pattern that fits no name fits some of them, and the words with which these go on."""
    wanted, words = pattern.split("."), [name.split(".") for name in names]
    for length in range(len(wanted) - 1, 0, -1):
        fitting = [name for name in words if all(map(fnmatchcase, name, wanted[:length]))]
        if following := sorted({name[length] for name in fitting if len(name) > length}):
            return ".".join(wanted[:length]), following
    return "", list(PART_NAMES.values())


def _check_zero(config: TrainConfig) -> None:
    if config.engine.zero_stage_d < 3 or config.training.penalty != "exact":
        return
    if make_method(config.training, config.generator).penalties:
        raise ValueError(
            "engine.zero_stage_d is 3, but training.penalty is exact: R1 and R2 differentiate twice through the "
            "discriminator, which DeepSpeed cannot do with partitioned parameters. Set engine.zero_stage_d to 0, 1 or "
            "2, or training.penalty to finite_difference"
        )


def _check_registered(config: TrainConfig) -> None:
    if config.tracking.register_as is not None and config.data.condition_channels:
        raise ValueError(
            f"tracking.register_as is {config.tracking.register_as}, but data.condition_channels is "
            f"{config.data.condition_channels}: a registered model draws from seeds and classes alone, so set "
            "tracking.register_as to null"
        )


LAST = "last"
"""Name of the stage that the config itself describes, in a run of several."""


def _check_stages(config: TrainConfig) -> None:
    total, batch = config.training.total_images, config.training.global_batch_size
    before = sum(stage.images for stage in config.stages.values())
    if config.stages and -(-before // batch) >= num_steps(config):
        raise ValueError(
            f"training.total_images is {total}, of which the stages {', '.join(config.stages)} take {before} and leave "
            "none for the last one: set training.total_images to the images of all stages together"
        )
    for name, stage in config.stages.items():
        if not re.fullmatch(r"[A-Za-z][\w-]{0,40}", name) or name == LAST:
            raise ValueError(
                f"stages: {name!r} cannot be the name of a stage: a name is a letter, then up to 40 letters, digits, - "
                f"or _, and {LAST} is the stage that the rest of the config describes"
            )
        if stage.images < batch:
            raise ValueError(
                f"stages.{name}.images is {stage.images}, less than the {batch} of training.global_batch_size, which "
                "one step takes"
            )
        if fixed := sorted({"total_images", "global_batch_size", "precision"} & stage.training.keys()):
            why = "set stages.{0}.images" if fixed == ["total_images"] else "it is the same in all stages"
            raise ValueError(f"stages.{name}.training.{fixed[0]} cannot be set: {why.format(name)}")


@cache
def _build_problem(generator: GeneratorConfig, form: ImageForm, noise_levels: tuple[float, ...]) -> str | None:
    """Why the generator cannot be built."""
    try:
        with without_values():
            build_generator(generator, form, noise_levels)
    except ValueError as error:
        return f"generator: {error}"
    except RuntimeError as error:  # torch counts the bytes of a tensor in 64 bits
        return f"generator: a layer is too large: {str(error).splitlines()[0]}"
    return None


def planned_precision(config: TrainConfig) -> Precision:
    """`training.precision`, with `auto` as for this machine's GPU, or for one that has bf16 if there is none.

    A run settles `auto` on the devices of its ranks, with `trainer.rank.build.settle_precision`.
    """
    chosen = config.training.precision
    if chosen != "auto":
        return chosen
    if config.scaling.device == "cpu":
        return "fp32"
    return best_precision(torch.device("cuda", 0)) if torch.cuda.is_available() else "bf16"


def num_steps(config: TrainConfig) -> int:
    """Number of optimizer steps of the run: total_images in global batches, rounded up."""
    return -(-config.training.total_images // config.training.global_batch_size)
