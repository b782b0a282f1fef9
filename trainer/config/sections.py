"""Every setting of a run, composed from the dataclasses that stand beside the code they steer.

A field's docstring says its unit and effect. `config_io` reads YAML into `TrainConfig`; the checks that need more than
one section are here, and all of them run before Ray or a GPU is touched.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainer.algorithm.gaussian import Prediction
from trainer.algorithm.methods import METHODS
from trainer.algorithm.schedules import LearningRateConfig
from trainer.engine.interface import AdamConfig

PositiveInt = Annotated[int, Field(gt=0)]


PositiveFloat = Annotated[float, Field(gt=0)]


NonNegativeFloat = Annotated[float, Field(ge=0)]


Decay = Annotated[float, Field(ge=0, lt=1)]


FIGURES = frozenset({"fid", "kid", "inception_score", "precision", "recall", "density", "coverage"})
"""Curves of an evaluation."""


if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(METHODS)]


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
    """Adversarial game of the denoising steps; `trainer/algorithm/losses.py` gives the divergence behind each one. With
    `gaussian` there is no game and no discriminator, but an ordinary denoising diffusion model
    (`trainer/algorithm/gaussian.py`)."""
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
    """What happens to updates whose loss or gradient is not a number, or too large; see `trainer/engine/guard.py`."""

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
