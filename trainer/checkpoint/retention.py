"""Which checkpoints stay: the newest ones, one every so many images, and the best by a metric."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.checkpoint.format import Checkpoint, CheckpointError, parse_manifest
from trainer.checkpoint.storage import CheckpointStorage
from trainer.config.sections import CheckpointConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The rules. A checkpoint stays if one of them wants it."""

    keep_last: int = 2
    """Newest ones that stay, at least 1."""
    keep_every_images: int | None = None
    """Of each so many images the first one stays for good."""
    keep_best: str | None = None
    """Metric whose best checkpoint stays."""
    keep_best_mode: Literal["min", "max"] = "min"
    """Whether a small or a large value is good."""

    @classmethod
    def of(cls, config: CheckpointConfig) -> "Retention":
        """The rules of a config."""
        return cls(
            keep_last=config.keep_last,
            keep_every_images=config.keep_every_images,
            keep_best=config.keep_best,
            keep_best_mode=config.keep_best_mode,
        )


@dataclass(frozen=True)
class Saved:
    """What the rules look at.

    Attributes:
        step, images: done when the checkpoint was written.
        value: of the metric in its manifest; None if it has none, or none that is a number.
    """

    step: int
    images: int
    value: float | None = None


def kept_steps(saved: Sequence[Saved], rules: Retention) -> set[int]:
    """Steps of the checkpoints that stay. Never empty unless there is no checkpoint at all."""
    ordered = sorted(saved, key=lambda s: s.step)
    kept = {s.step for s in ordered[-rules.keep_last :]}
    if rules.keep_every_images:
        first: dict[int, int] = {}
        for s in ordered:
            # The first of its interval stays the first when others go, so what was kept once is kept for good.
            first.setdefault(s.images // rules.keep_every_images, s.step)
        kept |= {step for interval, step in first.items() if interval > 0}
    measured = [(s.value, s.step) for s in ordered if s.value is not None]
    if rules.keep_best and measured:
        sign = 1 if rules.keep_best_mode == "min" else -1
        kept.add(min(measured, key=lambda pair: (sign * pair[0], -pair[1]))[1])
    return kept


def saved(checkpoint: Checkpoint, rules: Retention) -> Saved:
    """What the rules look at, from a manifest."""
    manifest = checkpoint.manifest
    value = manifest.get("metrics", {}).get(rules.keep_best) if rules.keep_best else None
    number = float(value) if isinstance(value, int | float) and value == value else None
    return Saved(checkpoint.step, int(manifest.get("images", 0)), number)


def prune(storage: CheckpointStorage, rules: Retention, newest: Checkpoint) -> None:
    """Delete what a checkpoint that has just been committed makes superfluous.

    That is what the rules do not keep, whatever lies beyond `newest` (it failed its verification, or the run would not
    stand here), and what saves left that never ended.

    Args:
        storage: where they lie.
        rules: which ones stay.
        newest: as committed.

    Raises:
        CheckpointError: `newest` is not there as its manifest says; nothing was deleted.
        OSError: the storage failed; `newest` and what the rules keep are untouched.
    """
    found = {checkpoint.path.name: checkpoint for checkpoint in storage.list()}
    own = found.get(newest.path.name)
    if own is None or own.manifest != newest.manifest:
        raise CheckpointError(f"{storage.shown}/{newest.path.name} is not there as it was written: nothing is deleted")
    storage.check_sizes(own)
    before = [saved(c, rules) for c in found.values() if c.step <= newest.step]
    if rules.keep_best and not any(s.value is not None for s in before):
        log.warning(
            "checkpoint.keep_best is %s, which no checkpoint has: its manifest has %s",
            rules.keep_best,
            ", ".join(sorted(newest.manifest.get("metrics", {}))) or "no metrics yet",
        )
    kept = kept_steps(before, rules)
    storage.tidy(own)
    for name in storage.names():
        if found[name].step not in kept if name in found else is_remains(storage, name):
            storage.delete(name)


def is_remains(storage: CheckpointStorage, name: str) -> bool:
    """Whether a folder that was not listed as a checkpoint is none indeed: cut, damaged, or of a save that never ended.

    Raises:
        OSError: nobody knows, since it cannot be read now.
    """
    content = storage.manifest(name)
    try:
        return content is None or not parse_manifest(content, name)
    except ValueError:
        return True
