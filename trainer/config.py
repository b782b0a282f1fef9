"""Every setting of a run, composed from the dataclasses that stand beside the code they steer.

A field's docstring says its unit and effect. `config_io` reads YAML into `TrainConfig`; the checks that need more than
one section are here, and all of them run before Ray or a GPU is touched.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Literal

import torch
from pydantic import Field

from data.pipeline import DataConfig
from models.diffusion import DiffusionConfig
from models.discriminator import DiscriminatorConfig, check_image_size
from models.generator import GeneratorConfig
from models.networks import build_generator
from trainer.batch_split import BatchSplit, split_evenly, split_groups
from trainer.losses import OBJECTIVES
from trainer.schedules import LearningRateConfig

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Prediction = Literal["x0", "epsilon"]
FIGURES = frozenset({"fid", "kid", "inception_score", "precision", "recall", "density", "coverage"})
"""Curves of an evaluation."""
ObjectiveName = Literal[
    "non_saturating", "saturating", "wasserstein", "least_squares", "hinge", "relativistic", "gaussian"
]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    directory: str
    """Folder of checkpoints, snapshots, samples and the tracking spool. The same folder resumes the same run."""
    group: str | None = None
    """Unix group that may read the folder, if the run makes it; null: its owner alone."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Keys every random number of the run: data order, t, z, noises, flips, initial weights."""
    deterministic: bool = False
    """Ask torch for deterministic kernels, on a GPU at a cost in speed; on the CPU runs are always repeatable."""
    init_from: str | None = None
    """File of generator weights to start from, a snapshot's or a published one; null: fresh weights."""


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """Adam, for the generator and the discriminator alike."""

    beta1: Decay = 0.5
    """Decay of the first moment."""
    beta2: Decay = 0.9
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Term added to the root of the second moment."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimization: batch, length, losses, precision."""

    total_images: PositiveInt
    """Length of the run in training images, rounded up to whole steps."""
    global_batch_size: PositiveInt
    """Images per optimizer step over all ranks, a multiple of discriminator.stddev_group_size: the ranks share its
    groups, as evenly as whole groups can be shared."""
    micro_batch_size: PositiveInt | None = None
    """Most images of one rank in one forward pass, in whole groups too; null: all the images of the rank at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute type. fp32 is float32 without TF32; with bf16 the parameters, optimizer, R1, minibatch deviation and
    losses stay fp32."""
    objective: ObjectiveName = "non_saturating"
    """Adversarial game of the denoising steps; `trainer/losses.py` says which divergence each one stands for. With
    `gaussian` there is no game and no discriminator: `trainer/regression.py`, an ordinary denoising diffusion model."""
    prediction: Prediction = "x0"
    """What the generator predicts with objective gaussian: the clean image, or the noise (`epsilon`)."""
    label_dropout: Decay = 0.0
    """Probability that both networks see an image without its label, in models with data.num_classes."""
    r1_gamma: NonNegativeFloat = 0.05
    """Weight of the R1 penalty; it enters the loss as r1_gamma / 2, not multiplied by the interval."""
    r2_gamma: NonNegativeFloat = 0.0
    """Weight of R2, the same penalty on generated images, at the steps of R1; R3GAN takes both with `relativistic`."""
    r1_interval_steps: PositiveInt | None = None
    """Apply R1 and R2 at steps 0, n, 2n, ...; null: at every step."""
    ema_decay: Decay = 0.9999
    """Decay of the generator's moving average, per optimizer step."""
    learning_rate_g: LearningRateConfig = field(default_factory=LearningRateConfig)
    """Learning rate of the generator over the run."""
    learning_rate_d: LearningRateConfig = field(default_factory=LearningRateConfig)
    """Learning rate of the discriminator over the run."""
    adam: AdamConfig = field(default_factory=AdamConfig)
    """Optimizer of both networks."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What runs backward, reduction and update."""

    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """`torch` is the plain twin without ZeRO: slower to scale, easy to debug."""
    zero_stage_g: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage of the generator: 0 replicates, 1 partitions optimizer states, 2 gradients too, 3 parameters too."""
    zero_stage_d: Annotated[int, Field(ge=0, le=3)] = 0
    """ZeRO stage of the discriminator, at most 2: R1 differentiates twice through it."""
    compile: bool = False
    """On a GPU, compile both networks: the first two steps take minutes longer. R1 and R2 are taken without it. No
    effect on a CPU, with run.deterministic, with dropout, or on a network at ZeRO stage 3. docs/benchmarks.md says what
    of it has been measured."""

    def __post_init__(self) -> None:
        if self.zero_stage_d == 3:
            raise ValueError(
                "zero_stage_d is 3, at most 2 is possible: R1 differentiates twice through the discriminator's "
                "convolutions, which DeepSpeed cannot do on partitioned parameters. Set zero_stage_d to 0, 1 or 2"
            )
        if self.backend == "torch" and (self.zero_stage_g or self.zero_stage_d):
            raise ValueError(
                f"backend torch has no ZeRO, zero_stage_g is {self.zero_stage_g} and zero_stage_d "
                f"{self.zero_stage_d}: set both to 0 or the backend to deepspeed"
            )


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Workers and what each gets."""

    world_size: PositiveInt = 1
    """Number of ranks, one Ray Train worker each."""
    min_world_size: PositiveInt | None = None
    """Fewest ranks with which Ray goes on when nodes are lost; back at `world_size` as soon as there is room again. The
    global batch stays the same. null: always `world_size`, the run waits for lost nodes to come back."""
    device: Literal["cpu", "gpu"] = "gpu"
    """`gpu` gives one GPU to each rank."""
    cpus_per_worker: PositiveInt = 1
    """CPUs Ray reserves for a rank: its main process and its loader processes. Also a rank's threads on the CPU."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often Ray restarts the group of workers from the last checkpoint after a failure: the first time at once,
    then after a pause of 2, 4, ... 60 seconds. Three failures at the same step end the run whatever this says."""
    timeout_s: PositiveInt = 1800
    """How long a rank waits for the others in a collective before it fails."""
    watchdog_s: PositiveFloat | None = 600.0
    """How long a rank may stand still in a step before it writes the stacks of its threads and ends itself, so that the
    group is restarted; start, grids, checkpoints and the end get timeout_s on top. null: never."""

    def __post_init__(self) -> None:
        if self.min_world_size is not None and self.min_world_size > self.world_size:
            raise ValueError(
                f"min_world_size is {self.min_world_size}, more than the {self.world_size} of world_size, which is the "
                f"most ranks that the run uses. Set min_world_size to at most {self.world_size}, or world_size to at "
                f"least {self.min_world_size}"
            )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens to updates whose loss or gradient is not a number, or too large; see `trainer/guard.py`."""

    max_gradient_norm: PositiveFloat | None = None
    """Updates whose averaged gradient has a larger L2 norm are skipped; null: only those that are not finite."""
    max_skipped_in_row: PositiveInt | None = 10
    """Updates of one network, skipped one after the other, after which the run goes back to its last checkpoint; looked
    at where the curves are logged. null: it never does. Data and draws come again as they were, so only what a fault of
    the machine did is undone."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 2
    """How often a run goes back because of the same steps before it ends with a diagnosis; it ends at once where there
    is no checkpoint."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the whole state is saved and how much of it is kept."""

    save_interval_steps: PositiveInt | None = 1000
    """Optimizer steps between checkpoints; null: only the last step and a stop are saved."""
    directory: str | None = None
    """Where checkpoints are kept: a folder that all ranks see, or a URL (s3://..., any fsspec filesystem that can be
    written). null: `checkpoints` in run.directory."""
    keep_last: PositiveInt = 2
    """Newest valid checkpoints that stay."""
    keep_every_images: PositiveInt | None = None
    """Training images after each of which one more checkpoint stays for good; null: none does."""
    keep_best: str | None = None
    """Curve, as it is logged (`loss_g`), whose best value so far keeps its checkpoint; null: none."""
    keep_best_mode: Literal["min", "max"] = "min"
    """Whether a small or a large value of keep_best is good."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Figures of merit during training, as `python -m trainer.evaluate` gives them."""

    interval_images: PositiveInt | None = None
    """Training images between evaluations of the averaged weights; null: none. The figures are curves (fid, kid,
    inception_score, precision, recall, density, coverage), which checkpoint.keep_best may name."""
    num_samples: Annotated[int, Field(ge=2)] = 1000
    """Samples that are drawn each time, the same noises throughout."""
    network: str | None = None
    """TorchScript file whose features are taken; null: a small classifier, trained on the labelled data set."""
    reference: str | None = None
    """What `trainer.evaluate --reference` takes; null: the data set of the run."""
    through: Literal["none", "png", "jpeg"] = "none"
    """File format that the samples go through first."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is logged, how often, and where."""

    backend: Literal["mlflow", "none"] = "mlflow"
    """`none` logs to the console only."""
    uri: str | None = None
    """MLflow tracking URI; null: MLFLOW_TRACKING_URI if set, else an SQLite file beside the runs."""
    experiment: str = "ddgan"
    """MLflow experiment that the run belongs to."""
    log_interval_steps: PositiveInt = 50
    """Steps between points of the curves; the only steps at which scalars leave the device."""
    sample_interval_steps: PositiveInt | None = 1000
    """Steps between sample grids; null: only one at the end."""
    num_samples: PositiveInt = 64
    """Images in a sample grid."""
    flush_timeout_s: NonNegativeFloat = 30.0
    """How long the end of a run waits for the tracking server to take what is still in the spool; a stop waits for 5
    seconds at most."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run."""

    run: RunConfig
    """Where it lives."""
    data: DataConfig
    """What it reads."""
    training: TrainingConfig
    """How it learns."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The forward process."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """The denoiser."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The critic of denoising steps."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Backward, reduction and update."""
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    """Ranks and devices."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Skipped updates."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Figures of merit."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Logging."""

    def __post_init__(self) -> None:
        """Check what needs more than one section; every broken rule is a line of one ValueError."""
        problems: list[str] = []
        for rule in (split_batch, _check_objective, _check_keep_best, _check_warmup, _check_networks):
            try:
                rule(self)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        _check_elastic(self)  # looks at this very config with other world sizes: nothing else may be wrong with it


def split_batch(config: TrainConfig) -> BatchSplit:
    """Spread the global batch over ranks and micro-batches.

    Raises:
        ValueError: It cannot be spread; the message shows the arithmetic.
    """
    training, discriminator = config.training, config.discriminator
    sizes = (training.global_batch_size, config.scaling.world_size, training.micro_batch_size)
    if discriminator.stddev_grouping == "strided":
        return split_evenly(*sizes, discriminator.stddev_group_size)
    return split_groups(*sizes, discriminator.stddev_group_size)


def _check_elastic(config: TrainConfig) -> None:
    """Each number of ranks that the run may come to must be able to share the batch."""
    scaling = config.scaling
    for world_size in range(scaling.min_world_size or scaling.world_size, scaling.world_size):
        try:
            fewer = replace(config, scaling=replace(scaling, world_size=world_size, min_world_size=None))
            if config.discriminator.stddev_grouping == "strided":
                _check_same_micro_batch(split_batch(fewer), split_batch(config))
        except ValueError as error:
            raise ValueError(
                f"scaling.min_world_size is {scaling.min_world_size} and scaling.world_size {scaling.world_size}: the "
                f"run may come to {world_size} ranks, but {error}"
            ) from None


def _check_same_micro_batch(fewer: BatchSplit, planned: BatchSplit) -> None:
    """Strided groups are those of a micro-batch: another one would compare other images."""
    if fewer.micro_batch_size != planned.micro_batch_size:
        raise ValueError(
            f"with discriminator.stddev_grouping strided the images of a forward pass may not change, from "
            f"{planned.micro_batch_size} to {fewer.micro_batch_size}. Set training.micro_batch_size to "
            f"{planned.micro_batch_size}, or stddev_grouping contiguous"
        )


def _check_objective(config: TrainConfig) -> None:
    training = config.training
    if training.label_dropout and not config.data.num_classes:
        raise ValueError(
            f"training.label_dropout is {training.label_dropout:g}, but data.num_classes is 0, so that there are no "
            "labels to drop: set data.num_classes to that of the data set, or training.label_dropout to 0"
        )
    if training.objective == "gaussian":
        if training.prediction == "epsilon" and config.generator.output_tanh:
            raise ValueError(
                "training.prediction is epsilon, but generator.output_tanh squashes the output into [-1, 1], which "
                "noise is not bound to: set generator.output_tanh to false"
            )
        return
    if training.prediction != "x0":
        raise ValueError(
            f"training.prediction is {training.prediction}, but with training.objective {training.objective} the "
            "generator makes x0: set training.prediction to x0, or training.objective to gaussian"
        )
    if not OBJECTIVES[training.objective].bounded and training.r1_gamma == training.r2_gamma == 0:
        raise ValueError(
            f"training.objective is {training.objective}, whose discriminator's loss has no lower bound unless a "
            "penalty holds its slope, but training.r1_gamma and training.r2_gamma are 0: set one of them above 0"
        )


def _check_keep_best(config: TrainConfig) -> None:
    """A figure must be there when a checkpoint is saved: one of other weights says nothing of these."""
    best, every = config.checkpoint.keep_best, config.evaluation.interval_images
    if best not in FIGURES:
        return
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
        warmup_images = getattr(config.training, name).warmup_images
        if warmup_images >= total_images:
            raise ValueError(
                f"training.{name}.warmup_images ({warmup_images}) must be less than training.total_images "
                f"({total_images}), or the rate never reaches its peak"
            )


def _check_networks(config: TrainConfig) -> None:
    size = config.data.image_size
    problems = [_build_problem(config.generator, size, config.data.image_channels)]
    try:
        if config.discriminator.kind != "mlp":
            check_image_size(config.discriminator, size)
    except ValueError as error:
        problems.append(f"discriminator.kind is {config.discriminator.kind}: {error}")
    if config.discriminator.kind == "small" and size > 64:
        problems.append(
            f"discriminator.kind is small: it halves data.image_size {size} only 3 times, so none of its outputs sees "
            "the whole image; it is for images up to 64 pixels. Use kind large"
        )
    if any(problems):
        raise ValueError("\n".join(filter(None, problems)))


@cache
def _build_problem(generator: GeneratorConfig, image_size: int, image_channels: int) -> str | None:
    """What keeps the generator from being built. On the meta device it takes no memory and draws no random number."""
    try:
        with torch.device("meta"):
            build_generator(generator, image_size=image_size, image_channels=image_channels)
    except ValueError as error:
        return f"generator: {error}"
    return None


def num_steps(config: TrainConfig) -> int:
    """Optimizer steps of the whole run: total_images in global batches, rounded up."""
    return -(-config.training.total_images // config.training.global_batch_size)
