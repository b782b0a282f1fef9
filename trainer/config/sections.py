"""The sections of a run's settings that belong to no other folder.

The docstring below a field is the setting's text in `--explain`, the schema and docs/settings.md: its unit, its effect,
and the meaning of null or 0.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from data.storage.redaction import HIDDEN
from models.dropout import DropProbability
from models.noise_levels import NoiseConfig
from trainer.algorithm.augmentation import AugmentationConfig
from trainer.algorithm.auxiliary import ReconstructionConfig
from trainer.algorithm.ema import MAX_WIDTH, MIN_WIDTH
from trainer.algorithm.losses import UnbalancedTransportConfig
from trainer.algorithm.method import Prediction
from trainer.algorithm.methods import METHODS
from trainer.algorithm.penalties import PenaltyKind
from trainer.algorithm.schedules import AdamConfig, LearningRateConfig, Weight
from trainer.engine.interface import Decay

JudgeKind = Literal["classifier", "lite0", "inception", "inception-clean", "dinov2", "file"]
"""Whose features samples are measured in: a classifier trained on the data, EfficientNet-Lite0, FID's Inception by a
published or by clean-fid's rule, DINOv2, or a network's file."""
RENAMED_FIGURES: dict[str, dict[str, str]] = {
    "lite0": {"fid": "fd_lite0", "kid": "kd_lite0", "inception_score": "class_score_lite0"},
    "inception-clean": {"fid": "clean_fid", "kid": "clean_kid"},
    "dinov2": {"fid": "fd_dinov2", "kid": "kd_dinov2"},
}
"""Names, by network, of the figures that must not be taken for FID, KID and Inception score; the others keep theirs."""
FIGURES = frozenset({"fid", "kid", "inception_score", "precision", "recall", "density", "coverage"}).union(
    *(names.values() for names in RENAMED_FIGURES.values())
)
"""Curves of an evaluation."""

TrackerName = Literal["mlflow", "tensorboard", "wandb"]
MAX_PROFILED_STEPS = 20
"""Most steps in one trace."""


if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(METHODS)]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run keeps its files, and what makes it repeatable."""

    directory: str
    """Folder for checkpoints, snapshots, samples and the tracking spool. A start with the same folder resumes its
    run."""
    group: str | None = None
    """Unix group that may read the folder. It is set when the run creates the folder. null: only the owner may read
    it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random number of the run: data order, t, z, noise, flips, dropout and initial weights."""
    deterministic: bool = False
    """Use deterministic kernels, which are slower on a GPU. On a CPU runs are always repeatable."""
    init_from: str | None = None
    """What to start from: the folder of a run, whose newest checkpoint is taken, of a snapshot, or of an exported
    model; or a file of generator weights, a snapshot's or one that the authors published. null: random weights."""
    init_from_discriminator: bool = True
    """Start the discriminator from run.init_from as well, if it has one: a run of the adversarial method, or a model
    that was exported with `--discriminator`."""


@dataclass(frozen=True, kw_only=True)
class PowerEmaConfig:
    """Moving averages of the generator's weights by power functions, next to the one that samples are drawn with."""

    widths: tuple[Annotated[float, Field(ge=MIN_WIDTH, le=MAX_WIDTH)], ...] = ()
    """Width of each average: the standard deviation of its weights over the steps so far, divided by their number. EDM2
    keeps [0.05, 0.1]. Each needs as much memory as the parameters. []: none."""
    interval_images: PositiveInt | None = None
    """Training images between two times that the averages are written to `averages` in run.directory; they are also
    written at the end of each stage. null: a 32nd of the stage."""

    def __post_init__(self) -> None:
        """Refuse a width that is given twice."""
        if len(set(self.widths)) < len(self.widths):
            raise ValueError(f"widths is {list(self.widths)}, with one of them twice: give each once")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The optimization: length, batch size, precision, losses and optimizer."""

    total_images: Annotated[int, Field(gt=0, le=10**15, description="no machine trains on more")]
    """Length of the run in training images, rounded up to whole steps. An image counts each time it is used."""
    global_batch_size: Annotated[int, Field(gt=0, le=10**7, description="a step would take hours")]
    """Images of one optimizer step, all ranks together; a multiple of discriminator.stddev_group_size. The ranks share
    its groups as evenly as whole groups allow."""
    micro_batch_size: PositiveInt | None = None
    """Most images that a rank takes in one forward pass, a multiple of discriminator.stddev_group_size. Smaller values
    need less memory; gradients accumulate over the passes of a step. null: all images of the rank in one pass."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Number type of the computation. `fp32`: float32. `tf32`: float32, but on a GPU the convolutions and matrix
    products round their factors to TF32. `bf16`: activations in bfloat16; the parameters, the optimizer, the moving
    average, the penalties R1 and R2, the minibatch deviation and the losses stay in float32, with products in TF32.
    `auto`: bf16 on a GPU that has it (compute capability 8.0 or higher), otherwise fp32, also with run.deterministic;
    the run records which, and a resumed run must keep it."""
    objective: ObjectiveName = "non_saturating"
    """Training objective. `gaussian` trains an ordinary denoising diffusion model without a discriminator. All others
    are adversarial losses; trainer/algorithm/losses.py gives the divergence that each one minimizes."""
    prediction: Prediction = "x0"
    """What the generator predicts: the clean image (`x0`), or the noise in the noisy one (`epsilon`, with objective
    gaussian only)."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """Noise levels that objective gaussian trains at. It has no effect with other objectives."""
    label_dropout: DropProbability = 0.0
    """Probability that the networks see an image without its label. Above 0, the trained model can also draw images
    without a class. Needs data.num_classes."""
    condition_dropout: DropProbability = 0.0
    """Probability that the networks see zeros instead of the condition. Above 0, the trained model can also draw images
    without one, and follow it more closely (`trainer.translate --guidance`). Needs data.condition_channels."""
    r1_gamma: Weight = 0.05
    """Weight of the R1 penalty, the squared slope of the discriminator at real images: a number, or its course over the
    run. The loss gets r1_gamma / 2 times the penalty, not multiplied by r1_interval_steps. 0: no R1."""
    r2_gamma: Weight = 0.0
    """Weight of the R2 penalty, the same as R1 at generated images, at the same steps. R3GAN uses both with objective
    relativistic. 0: no R2."""
    r1_interval_steps: PositiveInt | None = None
    """Apply R1 and R2 only at every n-th step: 0, n, 2n, ... null: at every step."""
    penalty: PenaltyKind = "exact"
    """How R1 and R2 are computed. `exact`: by a second derivative, in float32 and uncompiled. `finite_difference`: from
    the change of the logits along random noise, in float32; it needs forward passes only, so that it can be compiled,
    and the discriminator may be at ZeRO stage 3."""
    penalty_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """With penalty finite_difference: share of the images at which they are taken, 1/n for a whole number n: every n-th
    group of discriminator.stddev_group_size images."""
    penalty_epsilon: Annotated[float, Field(ge=1e-4, le=1, description="below, float32 rounds the difference away")] = (
        0.01
    )
    """With penalty finite_difference: standard deviation of the noise, in units of the images, which are in [-1, 1]."""
    logit_centring: NonNegativeFloat = 0.0
    """Weight of the mean square of D(real) + D(fake) in the discriminator's loss. It keeps the level of the logits,
    which objective relativistic leaves free, near 0. 0: none."""
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """Reconstruction loss of the generator. It has no effect with objective gaussian, which is one itself."""
    transport: Weight = 0.0
    """Weight of the transport loss in the generator's loss, a number or its course over the run: the mean over pixels
    of (x_t - sqrt(alpha) x_tm1)^2 / (2 beta) for generated x_tm1. It ties x_tm1 to its x_t where the discriminator does
    not see x_t (discriminator.sees marginal). AFM lets it fall along a cosine. 0: none."""
    afd: Weight = 0.0
    """Weight of SIDDM's auxiliary forward diffusion loss in the generator's loss, a number or its course over the run:
    the transport loss, less what is left of it where a regression of x_t by the discriminator takes the place of
    sqrt(alpha) x_tm1. The regression is trained along, with the same weight. Needs discriminator.sees marginal, and x_t
    in discriminator.predicts. SIDDM takes 1. 0: none."""
    denoising: Weight = 0.0
    """Weight of the denoising loss in the discriminator's loss, a number or its course over the run: the mean square
    error with which it predicts x0 of real x_tm1. Needs x0 in discriminator.predicts. SIDDM takes 1, and no R1. 0:
    none."""
    gradient_normalization: bool = False
    """Divide the gradient that the generator gets from the discriminator by the moving average of its length, as in
    AFM. Then the weights of training.transport, training.afd and training.reconstruction mean the same however steep
    the discriminator is."""
    unbalanced_transport: UnbalancedTransportConfig = field(default_factory=UnbalancedTransportConfig)
    """Cost and divergence of objective unbalanced_transport. It has no effect with other objectives."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Random transforms of all images that the discriminator sees, for data sets of some ten thousand images and fewer.
    It has no effect with objective gaussian, which has no discriminator."""
    ema_decay: Decay = 0.9999
    """Decay per optimizer step of the moving average of the generator's weights, which samples are drawn with. Not used
    if ema_half_life_images is set."""
    ema_half_life_images: Weight | None = None
    """Images after which a weight's share in the moving average has halved, instead of ema_decay: a number, or its
    course over the run. It stays right when the batch size changes. R3GAN lets it rise from 0. null: ema_decay."""
    power_ema: PowerEmaConfig = field(default_factory=PowerEmaConfig)
    """Further moving averages, from which `python -m trainer.average` makes one of any width after the run."""
    learning_rate_g: LearningRateConfig = field(default_factory=LearningRateConfig)
    """Learning rate of the generator over the run."""
    learning_rate_d: LearningRateConfig = field(default_factory=LearningRateConfig)
    """Learning rate of the discriminator over the run."""
    adam: AdamConfig = field(default_factory=AdamConfig)
    """Optimizer of both networks."""
    freeze: tuple[str, ...] = ()
    """Frozen parameters, by patterns of their names, in which `*` stands for any characters: the names in a
    checkpoint, after `generator.` or `discriminator.`, such as generator.down.0.blocks.0.conv1.weight. GDD freezes
    the convolutions of a trained denoiser, `[generator.*conv*.weight]`. They keep the values they start with,
    and have no gradient and no optimizer state. A pattern that begins with a star needs quotes. []: all learn."""

    def __post_init__(self) -> None:
        """Refuse a share of the images that is not every n-th."""
        n = 1 / self.penalty_share
        if abs(n - round(n)) > 1e-3 * n:
            raise ValueError(
                f"penalty_share is {self.penalty_share:g}, but every n-th group is taken: set it to 1, 0.5, 0.25 or "
                "another 1/n"
            )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage that comes before the one that the rest of the config describes: its length, and what differs in it."""

    images: Annotated[int, Field(gt=0, le=10**15, description="no machine trains on more")]
    """Training images of the stage, rounded up to whole steps. training.total_images counts them too."""
    training: dict[str, Any] = field(default_factory=dict)
    """Settings of the section training that differ in the stage; not total_images, global_batch_size and precision."""
    diffusion: dict[str, Any] = field(default_factory=dict)
    """Settings of the section diffusion that differ in the stage."""
    discriminator: dict[str, Any] = field(default_factory=dict)
    """Settings of the section discriminator that differ in the stage."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Number of ranks, their devices, and what happens when one fails."""

    world_size: Annotated[int, Field(gt=0, le=16_384, description="each rank keeps a connection to all others")] = 1
    """Number of ranks: the processes that train together. Each is one Ray Train worker."""
    min_world_size: PositiveInt | None = None
    """Fewest ranks with which the run continues when nodes are lost. It returns to world_size as soon as nodes are free
    again; the global batch stays the same. null: always world_size, so the run waits until lost nodes are back."""
    device: Literal["cpu", "gpu"] = "gpu"
    """Where the ranks compute. `gpu` gives one GPU to each rank."""
    cpus_per_worker: Annotated[int, Field(gt=0, le=4096, description="no machine has more")] = 1
    """CPUs that Ray reserves for a rank, for its main process and its loader processes. With device cpu, also the
    number of threads that the rank computes with."""
    max_failures: Annotated[int, Field(ge=0, le=1_000_000, description="a failure takes seconds")] = 3
    """How often Ray restarts the ranks from the last checkpoint after a failure: the first time at once, later after a
    pause of 2, 4, ... 60 seconds. Three failures at the same step always end the run."""
    timeout_s: Annotated[int, Field(gt=0, le=10**7, description="that is 115 days")] = 1800
    """Seconds that a rank waits for the others in a collective operation before it fails."""
    watchdog_s: Annotated[float, Field(gt=0, le=1e7, description="that is 115 days")] | None = 600.0
    """Seconds without progress in a step after which a rank writes the stack of each thread to the log and ends itself,
    so that the ranks are restarted. The start, grids, evaluations, checkpoints and the end get timeout_s in addition.
    null: never."""

    def __post_init__(self) -> None:
        if self.min_world_size is not None and self.min_world_size > self.world_size:
            raise ValueError(
                f"min_world_size is {self.min_world_size}, more than the {self.world_size} of world_size, which is the "
                f"most ranks that the run uses. Set min_world_size to at most {self.world_size}, or world_size to at "
                f"least {self.min_world_size}"
            )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens to updates whose loss or gradient is not finite or too large."""

    max_gradient_norm: PositiveFloat | None = None
    """Skip updates whose averaged gradient has a larger L2 norm. null: skip only those that are not finite."""
    max_skipped_in_row: PositiveInt | None = 10
    """Number of updates of one network, skipped in a row, after which the run returns to its last checkpoint; checked
    when curves are logged. The same data and random numbers follow again, so this helps only against faults of the
    machine. null: the run never returns."""
    max_rollbacks: NonNegativeInt = 2
    """How often a run returns because of the same steps before it ends with a diagnosis. Without a checkpoint it ends
    at once."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of a run is saved, and which checkpoints are kept."""

    save_interval_steps: PositiveInt | None = 1000
    """Optimizer steps between checkpoints. null: only at the end and when the run is stopped."""
    directory: str | None = None
    """Where checkpoints are kept: a folder that all ranks can write, or a URL such as s3://bucket/run (any fsspec
    filesystem that can be written). null: the folder `checkpoints` in run.directory."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints that are kept."""
    keep_every_images: PositiveInt | None = None
    """Keep one checkpoint for good each time this many images have been trained on. null: none."""
    keep_best: str | None = None
    """Name of a logged curve, such as loss_g or fid: the checkpoint with its best value so far is kept. null: none."""
    keep_best_mode: Literal["min", "max"] = "min"
    """Whether the smallest (`min`) or the largest (`max`) value of keep_best is the best."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Measuring sample quality during training, as `python -m trainer.evaluate` does it."""

    interval_images: PositiveInt | None = None
    """Training images between evaluations of the averaged weights. The results are logged as the curves fid, kid,
    inception_score, precision, recall, density and coverage, which checkpoint.keep_best may name. With the network
    lite0 the first three are fd_lite0, kd_lite0 and class_score_lite0; with inception-clean the first two are clean_fid
    and clean_kid, with dinov2 fd_dinov2 and kd_dinov2. null: no evaluations."""
    num_samples: Annotated[int, Field(ge=2, le=10**7, description="their features would fill the memory")] = 1000
    """Samples drawn for each evaluation, from the same noise each time."""
    network: str | None = None
    """`lite0`, EfficientNet-Lite0 with its ImageNet weights, for photographs; `inception`, `inception-pytorch`,
    `inception-clean` or `dinov2`, the published networks; or a TorchScript file of the feature network. null or
    `classifier`: a small classifier that is trained on the data set, which must have labels."""
    reference: str | None = None
    """Images to compare with, in any form that `python -m trainer.evaluate --reference` takes. null: the data set of
    the run."""
    through: Literal["none", "png", "jpeg"] = "none"
    """Image format that samples are encoded in and decoded from before they are measured."""


@dataclass(frozen=True, kw_only=True)
class GridsConfig:
    """Grids of samples, drawn during training with the averaged weights and written to `samples` in run.directory."""

    interval_steps: PositiveInt | None = 1000
    """Optimizer steps between grids. null: one grid, at the end."""
    num_images: Annotated[int, Field(gt=0, le=10_000, description="they are one PNG file")] = 64
    """Images in a grid."""


def shown_address(address: str | None) -> str | None:
    """A web address without what may be secret in it, such as https://hooks.example.org/***; None if it is none."""
    if address is None:
        return None
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not host or not address.isprintable() or " " in address:
        return None
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}/{HIDDEN}"


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is logged, how often and where."""

    backends: tuple[TrackerName, ...] = ("mlflow",)
    """Trackers that get the run's curves, images, settings and files: `mlflow`; `tensorboard`, event files in
    run.directory; `wandb`, Weights & Biases, which needs the extra `wandb`. []: none, curves are only on the
    console."""
    uri: str | None = None
    """MLflow tracking URI. null: the environment variable MLFLOW_TRACKING_URI or, without it, an SQLite file next to
    run.directory."""
    experiment: str = "ddgan"
    """Name of the MLflow experiment, and of the project in Weights & Biases, that the run belongs to."""
    register_as: str | None = None
    """Name of a model in MLflow's registry, of which the snapshot at the end of the run becomes a version: a pyfunc
    that draws images of given seeds and classes. It is registered later, like all records, if the server is down.
    null: none."""
    log_interval_steps: PositiveInt = 50
    """Optimizer steps between two points of the curves. Values leave the device only at these steps."""
    flush_timeout_s: Annotated[float, Field(ge=0, le=86_400, description="that is a day")] = 30.0
    """Seconds that the end of a run waits until the trackers have taken what is left to send; a stopped run waits at
    most 5 seconds."""

    notify: str | None = None
    """Web address that gets a small JSON message when `trainer.run` starts a run or restarts its ranks, and when the
    run stops, diverges, fails or finishes; http or https. It is part of no file that a run writes, since such an
    address is often a secret. null: none."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last optimizer step, counted from 1, of which a trace for Perfetto is written to run.directory/profile,
    and on a GPU a snapshot of its memory. At most 20 steps: each takes a few MB, and traced steps are slower. null:
    none."""
    profile_ranks: Literal["first", "all"] = "first"
    """The ranks that write one: `first`, rank 0 alone, or `all`."""

    def __post_init__(self) -> None:
        """Refuse a tracker that is given twice, an address that none can be, and steps that are no range."""
        if self.register_as is not None:
            if not self.register_as.strip() or set(self.register_as) & set("/:"):
                raise ValueError("register_as is no name of a model: it may not be empty, or hold / or :")
            if "mlflow" not in self.backends:
                raise ValueError(
                    f"register_as is {self.register_as}, but backends is {list(self.backends)}: MLflow has the "
                    "registry, so add mlflow to backends, or set register_as to null"
                )
        if self.notify is not None and shown_address(self.notify) is None:
            raise ValueError("notify is no web address; expected is one such as https://hooks.example.org/name")
        if len(set(self.backends)) < len(self.backends):
            raise ValueError(f"backends is {list(self.backends)}, with one of them twice: give each once")
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 0 <= last - first < MAX_PROFILED_STEPS:
                raise ValueError(
                    f"profile_steps is [{first}, {last}]; expected are a first and a last step, up to "
                    f"{MAX_PROFILED_STEPS} steps together, such as [100, 105]"
                )
