"""Which settings may change between the config a run was saved with and the one it is resumed with.

A setting may change if it only affects where, for how long or on what hardware the run continues, or what it reports.
It may not change if it alters what a step computes (by more than the order of float sums) or which samples and random
numbers the step draws: the result would belong to neither config, so a new run is needed.
"""

from dataclasses import dataclass, replace
from typing import Any

from trainer.config.draft import ConfigError
from trainer.config.io import flat
from trainer.config.train_config import TrainConfig, planned_precision, split_batch


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field that differs between two configs."""

    key: str
    """Dotted name, such as `training.r1_gamma`."""
    old: Any
    """Value in the first config."""
    new: Any
    """Value in the second config."""

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Whether one field, or every field of one section, may change on resume."""

    may_change: bool
    """Whether it may."""
    reason: str
    """Why, and the effect of a change."""


def _may(reason: str) -> Rule:
    return Rule(may_change=True, reason=reason)


def _fixed(reason: str) -> Rule:
    return Rule(may_change=False, reason=reason)


_LEARNING_RATE = _fixed("the learning rate is a function of images seen over the whole run")
RULES: dict[str, Rule] = {
    "run.directory": _may("the folder may have been moved"),
    "run.group": _may("it says who may read the folder when it is made"),
    "run.seed": _fixed("the seed keys the order of the data and every random draw"),
    "run.deterministic": _may("it chooses between kernels that differ in rounding only"),
    "run.init_from": _may("it is read only where a run starts, a resumed one has its own weights"),
    "run.init_from_discriminator": _may("it is read only where a run starts"),
    "data.path": _may("the folder may have been moved; the index in it must still be the same, byte for byte"),
    "data.image_size": _fixed("it is part of the data and of the networks"),
    "data.domain": _fixed("it is what the networks see"),
    "data.image_channels": _fixed("it is part of the data and of the networks"),
    "data.condition_channels": _fixed("it is part of the data and of the networks"),
    "data.num_classes": _fixed("it is part of the data and of the networks"),
    "data.horizontal_flip": _fixed("it changes what the networks see"),
    "data.loader_workers": _may("the order of samples does not depend on it"),
    "data.verify": _may("it says only how much is checked before a start"),
    "data.max_bad_percent": _may("it says only when a run gives up"),
    "data.cache_directory": _may("it is only where copies of the shards lie"),
    "data.cache_gb": _may("it bounds only copies of the shards"),
    "data.shuffle_window_shards": _fixed("it changes the order of samples, so some would be seen twice and some never"),
    "training.total_images": _may(
        "the cosine of the learning rate is stretched, the rate jumps at the point of resuming"
    ),
    "training.global_batch_size": _fixed("steps, data order and random draws are counted in global batches"),
    "training.micro_batch_size": _may("the global batch stays the same, only the order of float sums changes"),
    "training.reconstruction": _fixed("it is part of the loss"),
    "training.transport": _fixed("it is part of the loss"),
    "training.afd": _fixed("it is part of the loss"),
    "training.denoising": _fixed("it is part of the loss"),
    "training.gradient_normalization": _fixed("it changes every step"),
    "training.unbalanced_transport": _fixed("it is part of the loss"),
    "training.augmentation": _fixed("it changes what the discriminator sees"),
    "training.precision": _fixed(
        "it changes the numbers of every step. Set it to the run's own value: with auto, it is what the device has"
    ),
    "training.objective": _fixed("it is the loss"),
    "training.noise": _fixed("it is what the average of the weights has learned from"),
    "training.label_dropout": _fixed("it changes what the networks see"),
    "training.condition_dropout": _fixed("it changes what the networks see"),
    "training.prediction": _fixed("it is what the saved weights predict"),
    "training.freeze": _fixed("only what learns has an optimizer state"),
    "training.r1_gamma": _fixed("it is part of the loss"),
    "training.r2_gamma": _fixed("it is part of the loss"),
    "training.penalty": _fixed("it is part of the loss"),
    "training.penalty_share": _fixed("it is part of the loss"),
    "training.penalty_epsilon": _fixed("it is part of the loss"),
    "training.logit_centring": _fixed("it is part of the loss"),
    "training.r1_interval_steps": _fixed("it is part of the loss"),
    "training.ema_decay": _fixed("the average so far was made with it"),
    "training.ema_half_life_images": _fixed("the average so far was made with it"),
    "training.power_ema.widths": _fixed("the averages so far were made with them"),
    "training.power_ema.interval_images": _may("it says only when averages are written"),
    "training.learning_rate_g": _LEARNING_RATE,
    "training.learning_rate_d": _LEARNING_RATE,
    "training.adam": _fixed("the moments so far were made with it"),
    "stages": _fixed("the state so far is that of a stage, or follows from it"),
    "diffusion": _fixed("it is the process that the networks learn to undo"),
    "generator": _fixed("it is the network whose weights are saved"),
    "discriminator": _fixed("it is the network whose weights are saved"),
    "engine": _may("it holds and reduces the same states in another way, only rounding changes"),
    "scaling": _may("the global batch, its samples and its random draws do not depend on the ranks"),
    "guard": _may("it says which updates are skipped and when a run gives up, those made are what they were"),
    "checkpoint": _may("it says only when the state is saved"),
    "evaluation": _may("it says only what is reported"),
    "grids": _may("it says only what is drawn"),
    "tracking": _may("it says only what is reported and where"),
}
"""By dotted name of a field or section; the longest matching name applies. Every field has a rule."""


def rule_for(key: str) -> Rule:
    """The rule of a field given by its dotted name; KeyError if the table has none."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        rule = RULES.get(".".join(parts[:length]))
        if rule is not None:
            return rule
    raise KeyError(key)


def diff_configs(old: TrainConfig, new: TrainConfig) -> tuple[Difference, ...]:
    """Fields that differ, in the order of the config."""
    old_values, new_values = flat(old), flat(new)
    return tuple(
        Difference(key=key, old=old_values.get(key), new=new_values.get(key))
        for key in dict.fromkeys(
            (*new_values, *old_values)
        )  # a setting may be a number in one and a section in the other
        if old_values.get(key) != new_values.get(key)
    )


def check_resumable(old: TrainConfig, new: TrainConfig) -> tuple[str, ...]:
    """Check that a run saved under `old` may resume under `new`.

    Returns:
        One line for each field that differs, with the effect of its change; for the log.

    Raises:
        ConfigError: A field differs that may not; says which, why, and which fields may change.
    """
    differences = diff_configs(old, _with_precision_of(old, new))
    refused = [
        f"{difference} may not change when a run is resumed: {rule_for(difference.key).reason}"
        for difference in differences
        if not rule_for(difference.key).may_change
    ]
    refused += _changed_statistics(old, new)
    if refused:
        allowed = ", ".join(key for key, rule in RULES.items() if rule.may_change)
        refused.append(f"May change: {allowed}. For anything else start a new run in another run.directory")
        raise ConfigError(refused)
    return tuple(f"{difference} ({rule_for(difference.key).reason})" for difference in differences)


def _with_precision_of(old: TrainConfig, new: TrainConfig) -> TrainConfig:
    """`new` with `auto` as far as it is known: on a GPU only the ranks know it, and they check again."""
    if new.training.precision != "auto" or old.training.precision == "auto":
        return new
    known = planned_precision(new) if new.scaling.device == "cpu" else old.training.precision
    return replace(new, training=replace(new.training, precision=known))


def _changed_statistics(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Refuse rank counts or micro-batches that change which images are grouped in the minibatch deviation."""
    if old.discriminator != new.discriminator or old.training.global_batch_size != new.training.global_batch_size:
        return []
    if new.discriminator.stddev_grouping == "contiguous":
        return []  # ranks and micro-batches contain whole groups of the global batch, whatever their number
    old_micro, new_micro = split_batch(old).micro_batch_size, split_batch(new).micro_batch_size
    if old_micro == new_micro:
        return []
    return [
        f"training.micro_batch_size: {old_micro} -> {new_micro} images in one forward pass of a rank may not change "
        f"here: the discriminator's minibatch deviation (strided groups of {new.discriminator.stddev_group_size}) "
        f"would compare other images. Set training.micro_batch_size to {old_micro}"
    ]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
