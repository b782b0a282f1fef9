"""Augmentation of what the discriminator sees: one transform T for x_tm1 and x_t of a sample, for real and generated.

D judges T(x_tm1) and T(x_t), in its own update and in G's. It can then not learn few training images by heart, and G,
whose gradient flows through T, is not taught to make transformed images (DiffAugment, Zhao et al., 2006.10738, Eq. 4-6;
ADA, Karras et al., 2006.06676, section 2.2).

Each transform moves or hides whole pixels, so a transformed noisy image is the transformed image with white noise.
Brightness, contrast and saturation are left out: they would scale the noise as well, and D would see noise levels that
no step has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int64
from pydantic import Field, PositiveInt
from torch import Tensor

from models.shapes import Image, Logits
from trainer.algorithm.randomness import Draws, Purpose
from trainer.algorithm.schedules import Probability, ProbabilityCosine, is_zero, value_at

TransformName = Literal["flip", "shift", "cutout"]
SHIFT, CUTOUT = 1 / 8, 1 / 2
"""Longest shift and side of the hidden square, as fractions of an image's side (2006.10738, section 4)."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveConfig:
    """A probability that follows how sure the discriminator is of the training images."""

    target: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Mean of +1 for each real image that the discriminator holds for real, and -1 for each other one: while it is
    higher, the probability rises, while it is lower, it falls. With objectives relativistic and wasserstein, +1 where
    the real image gets a higher logit than the generated one."""
    images: PositiveInt = 500_000
    """Training images over which the probability can rise from 0 to 1. It changes at every fourth step."""


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Random transforms of all images that the discriminator sees, real and generated, in both updates."""

    transforms: Annotated[tuple[TransformName, ...], Field(min_length=1)] = ("flip", "shift", "cutout")
    """Which ones, each drawn on its own for each image: `flip` mirrors half of the images that it is drawn for, `shift`
    moves by up to an eighth of the side in both directions and fills with zeros, `cutout` hides a square of half the
    side. Leave flip out where a mirrored image means something else, such as a digit."""
    probability: Probability | ProbabilityCosine = 0.0
    """Probability of each transform for an image: a number, or its course over the run. R3GAN lets it rise from 0 to
    0.3 or 0.55. Above 0.8 the generator may learn to make transformed images. 0: no augmentation."""
    adaptive: AdaptiveConfig | None = None
    """Let the probability follow the discriminator instead: it starts at 0 in each stage. null: as in probability."""

    def __post_init__(self) -> None:
        """Refuse a transform that is named twice, and two probabilities."""
        if self.adaptive and not is_zero(self.probability):
            raise ValueError(
                "adaptive is set, whose probability starts at 0, but probability is not 0: set probability to 0, or "
                "adaptive to null"
            )
        if len(set(self.transforms)) < len(self.transforms):
            raise ValueError(
                f"transforms is [{', '.join(self.transforms)}], but each is drawn once for an image: name each once"
            )

    @property
    def is_on(self) -> bool:
        """Whether any image is ever transformed."""
        return self.adaptive is not None or not is_zero(self.probability)

    def at(self, images_seen: int) -> "AugmentationConfig":
        """The same with the probability of the step that starts after ``images_seen`` images."""
        return replace(self, probability=value_at(self.probability, images_seen))


class ViewPurposes(NamedTuple):
    """The random numbers that one update's transforms use."""

    flip: Purpose
    shift: Purpose
    cutout: Purpose


VIEW_OF_D = ViewPurposes(Purpose.D_AUGMENT_FLIP, Purpose.D_AUGMENT_SHIFT, Purpose.D_AUGMENT_CUTOUT)
VIEW_OF_G = ViewPurposes(Purpose.G_AUGMENT_FLIP, Purpose.G_AUGMENT_SHIFT, Purpose.G_AUGMENT_CUTOUT)


@dataclass(frozen=True)
class View:
    """The transforms of a micro-batch's samples, drawn. Calling it transforms images.

    Pixel (i, j) of the result is pixel (rows[i], columns[j]) of the image, or 0 where it is not visible. Rows and
    columns are permutations: what a shift moves out on one side comes in on the other, where it is not visible.

    Attributes:
        rows, columns: where the pixels come from, in [0, H) and [0, W).
        rows_back, columns_back: the inverse permutations.
        visible: False where the result is 0.
    """

    rows: Int64[Tensor, "b h"]
    columns: Int64[Tensor, "b w"]
    rows_back: Int64[Tensor, "b h"]
    columns_back: Int64[Tensor, "b w"]
    visible: Bool[Tensor, "b 1 h w"]

    @classmethod
    def of(
        cls,
        draws: Draws,
        purposes: ViewPurposes,
        shape: tuple[int, ...],
        transforms: tuple[TransformName, ...],
        probability: float | Tensor,
    ) -> "View":
        """Draw the transforms: a pure function of (seed, step, sample, purpose), with the same bits on every device.

        In this order, each with `probability`: mirrored by a fair coin, as in ADA, so that mirrored images never
        outnumber the others; moved by whole pixels, uniformly up to an eighth of the side, in both directions; a square
        of half the side hidden, whose centre is uniform over the image and which the border may cut.

        Args:
            draws: random numbers of the samples.
            purposes: those of the update.
            shape: C, H, W of an image.
            transforms: which transforms.
            probability: of each of them, in [0, 1]; a number, or float64 [] on the device of the draws.
        """
        H, W = shape[-2:]
        # Comparing integers gives the same bits on every device.
        scaled = probability * 2**32
        threshold = scaled.round().to(torch.int64) if isinstance(scaled, Tensor) else round(scaled)

        def drawn(purpose: Purpose) -> tuple[Bool[Tensor, "b 1"], Int64[Tensor, "b 1"], Int64[Tensor, "b 1"]]:
            """Whether a sample is transformed, and two uniform integers in [0, 2**32)."""
            coin, first, second, _ = draws.words(purpose).split(1, dim=1)
            return coin < threshold, first, second

        i, j = (torch.arange(side, device=draws.samples.device)[None] for side in (H, W))
        rows = rows_back = i.expand(len(draws.samples), -1)
        columns = columns_back = j.expand(len(draws.samples), -1)
        visible = torch.ones_like(draws.samples, dtype=torch.bool)[:, None, None].expand(-1, H, W)
        if "flip" in transforms:
            chosen, coin, _ = drawn(purposes.flip)
            mirrored = chosen & (coin % 2 == 1)
            columns = columns_back = torch.where(mirrored, W - 1 - j, j)
        if "shift" in transforms:
            chosen, *words = drawn(purposes.shift)
            down, right = (
                torch.where(chosen, _uniform(word, 2 * int(SHIFT * side) + 1) - int(SHIFT * side), 0)
                for word, side in zip(words, (H, W), strict=True)
            )
            visible = visible & _within(i - down, 0, H)[:, :, None] & _within(j - right, 0, W)[:, None, :]
            rows, rows_back = (i - down) % H, (i + down) % H
            columns, columns_back = columns.gather(1, (j - right) % W), (columns_back + right) % W
        if "cutout" in transforms:
            chosen, *words = drawn(purposes.cutout)
            top, left = (
                _uniform(word, side) - int(CUTOUT * side) // 2 for word, side in zip(words, (H, W), strict=True)
            )
            hidden_rows, hidden_columns = _within(i - top, 0, int(CUTOUT * H)), _within(j - left, 0, int(CUTOUT * W))
            visible = visible & ~(chosen[:, :, None] & hidden_rows[:, :, None] & hidden_columns[:, None, :])
        return cls(rows, columns, rows_back, columns_back, visible[:, None])

    def __call__(self, x: Image) -> Image:
        """The images as D sees them, of the same shape and dtype; differentiable any number of times."""
        moved: Tensor = _Permuted.apply(x, self.rows, self.columns, self.rows_back, self.columns_back)  # pyright: ignore[reportAssignmentType]
        return moved.masked_fill(~self.visible, 0.0)

    def of_some(self, choose: Callable[[Tensor], Tensor]) -> "View":
        """The view of some of the samples; `choose` takes their entries out of a tensor [B, ...]."""
        parts = (self.rows, self.columns, self.rows_back, self.columns_back, self.visible)
        return View(*map(choose, parts))


class AdaptiveProbability:
    """The probability of a transform as a state of the run (ADA, 2006.06676, section 3).

    Every fourth step, with r the mean over these steps' samples of the sign of D's certainty about the real image:

        p <- min(1, max(0, p + sign(r - target) * 4 batch / images))

    Signs are counted as integers and summed over the ranks, so p has the same bits on each of them, and depends on
    their number only as far as the logits do. It stays on the device: no step waits for it.

    Attributes:
        value: p, float64 [].
    """

    INTERVAL_STEPS = 4

    def __init__(
        self,
        config: AdaptiveConfig,
        global_batch_size: int,
        device: torch.device,
        total: Callable[[Tensor], Tensor] = lambda counts: counts,
    ) -> None:
        """Start at 0.

        Args:
            config: target and speed.
            global_batch_size: images of a step.
            device: of D's logits.
            total: sum of a tensor on `device` over the ranks, a collective.
        """
        self._target, self._total = config.target, total
        self._samples = self.INTERVAL_STEPS * global_batch_size
        self._change = self._samples / config.images
        # They change in place: a recorded update reads and writes the same memory each time.
        self.value = torch.zeros((), dtype=torch.float64, device=device)
        self._signs, self._counted = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

    def count(self, certainty: Logits) -> None:
        """Take in D's certainty about real images of this rank; what is not a number counts as neither."""
        self._counted += (certainty > 0).sum() - (certainty < 0).sum()

    def end_step(self, steps: int) -> None:
        """Sum the signs of a step over the ranks and, after every fourth, change the probability. A collective.

        Args:
            steps: steps of the stage that are done.
        """
        self._signs += self._total(self._counted)
        self._counted.zero_()
        if steps % self.INTERVAL_STEPS:
            return
        direction = (self._signs.to(torch.float64) - self._target * self._samples).sign()
        self.value.add_(direction * self._change).clamp_(0.0, 1.0)
        self._signs.zero_()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, between steps; the same on all ranks."""
        return {"probability": self.value, "signs": self._signs}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint's state; an empty one is that of a stage's start.

        Raises:
            ValueError: it is no state of this class.
        """
        start = {"probability": torch.zeros((), dtype=torch.float64), "signs": torch.zeros((), dtype=torch.int64)}
        state = state or start
        fits = state.keys() == start.keys() and all(
            (state[name].dtype, state[name].shape) == (x.dtype, x.shape) for name, x in start.items()
        )
        if not fits or not 0 <= state["probability"].item() <= 1 or abs(int(state["signs"].item())) > self._samples:
            raise ValueError("its probability of augmentation is none")
        self.value.copy_(state["probability"])
        self._signs.copy_(state["signs"])
        self._counted.zero_()


class _Permuted(torch.autograd.Function):
    """Rows and columns of each image, permuted. The gradient is permuted back.

    Torch's own gradient of `gather` adds into the source with atomic operations, which a GPU in deterministic mode
    refuses or makes slow.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, columns: Tensor, rows_back: Tensor, columns_back: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns, rows_back, columns_back)
        of_rows, of_columns = rows[:, None, :, None].expand(x.shape), columns[:, None, None, :].expand(x.shape)
        return x.gather(3, of_columns).gather(2, of_rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, rows_back, columns_back = ctx.saved_tensors
        return _Permuted.apply(*gradients, rows_back, columns_back, rows, columns), None, None, None, None  # pyright: ignore[reportReturnType]


def _uniform(word: Int64[Tensor, "b 1"], high: int) -> Int64[Tensor, "b 1"]:
    """An integer in [0, high) from one in [0, 2**32)."""
    return (word * high) >> 32


def _within(x: Tensor, low: int, high: int) -> Tensor:
    return (x >= low) & (x < high)
