"""Which checkpoints are kept: the newest ones, one per interval of images, and the best by a metric."""

import argparse
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.checkpoint.format import (
    Checkpoint,
    CheckpointError,
    NewerFormatError,
    UnreadableError,
    parse_manifest,
    step_of,
)
from trainer.checkpoint.storage import CheckpointStorage, find_checkpoint
from trainer.config.io import from_dict
from trainer.config.sections import CheckpointConfig
from trainer.engine.ranks import Ranks

log = logging.getLogger(__name__)

Choice = int | Literal["latest", "best"]
"""A checkpoint of a run: its step, the newest valid one, or the best by `checkpoint.keep_best`."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The rules. A checkpoint is kept if any of them applies."""

    keep_last: int = 2
    """Number of newest checkpoints to keep, at least 1."""
    keep_every_images: int | None = None
    """Interval in images whose first checkpoint is kept forever."""
    keep_best: str | None = None
    """Metric whose best checkpoint is kept."""
    keep_best_mode: Literal["min", "max"] = "min"
    """Whether a small or a large value is better."""

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
    """What the rules know of a checkpoint.

    Attributes:
        step, images: number done when the checkpoint was written.
        value: the metric in its manifest; None if it is missing or not a number.
    """

    step: int
    images: int
    value: float | None = None


def kept_steps(saved: Sequence[Saved], rules: Retention) -> set[int]:
    """Steps of the checkpoints to keep. Empty only if there are no checkpoints."""
    ordered = sorted(saved, key=lambda s: s.step)
    kept = {s.step for s in ordered[-rules.keep_last :]}
    if rules.keep_every_images:
        first: dict[int, int] = {}
        for s in ordered:
            # The first of an interval stays first when others are deleted, so it is never dropped later.
            first.setdefault(s.images // rules.keep_every_images, s.step)
        kept |= {step for interval, step in first.items() if interval > 0}
    best = best_step(saved, rules)
    return kept if best is None else kept | {best}


def best_step(saved: Sequence[Saved], rules: Retention) -> int | None:
    """Step of the best checkpoint by the metric of the rules, of equal ones the newest; None if none has a value."""
    measured = [(s.value, s.step) for s in saved if s.value is not None]
    sign = 1 if rules.keep_best_mode == "min" else -1
    return min(measured, key=lambda pair: (sign * pair[0], -pair[1]))[1] if rules.keep_best and measured else None


def saved(checkpoint: Checkpoint, rules: Retention) -> Saved:
    """Read `Saved` from a manifest."""
    manifest = checkpoint.manifest
    value = manifest.get("metrics", {}).get(rules.keep_best) if rules.keep_best else None
    number = float(value) if isinstance(value, int | float) and value == value else None
    return Saved(checkpoint.step, int(manifest.get("images", 0)), number)


def checkpoint_argument(text: str) -> Choice:
    """For argparse: a `Choice`."""
    if text == "latest" or text == "best":
        return text
    if not re.fullmatch(r"[0-9]{1,20}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is given, allowed are a step such as 1000, latest and best")
    return int(text)


def choose_checkpoint(storage: CheckpointStorage, choice: Choice) -> Checkpoint:
    """The chosen checkpoint; in a local folder, verified.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or nothing says which one is the best.
    """
    if choice != "best":
        return find_checkpoint(storage, None if choice == "latest" else choice)
    found = storage.list()
    if not found:
        raise CheckpointError(f"{storage.shown} holds no valid checkpoint yet")
    rules = Retention.of(from_dict(found[-1].manifest["config"], str(found[-1].path)).checkpoint)
    if rules.keep_best is None:
        raise CheckpointError(
            f"{storage.shown}: checkpoint.keep_best names no curve, so that none of its checkpoints is the best: give "
            "a step. trainer.evaluate --checkpoints all measures them"
        )
    best = best_step([saved(checkpoint, rules) for checkpoint in found], rules)
    if best is None:
        raise CheckpointError(f"{storage.shown}: no checkpoint has a value of {rules.keep_best} yet: give a step")
    return find_checkpoint(storage, best)


def steps_of(storage: CheckpointStorage, ranks: Ranks | None = None) -> list[int]:
    """Steps of all checkpoints, in ascending order; with `ranks` a collective, those that rank 0 sees."""

    def seen() -> list[int]:
        return sorted(checkpoint.step for checkpoint in storage.list())

    if ranks is None:
        return seen()
    return ranks.broadcast(ranks.all_do(lambda: seen() if ranks.rank == 0 else [], CheckpointError, OSError))


def prune(storage: CheckpointStorage, rules: Retention, newest: Checkpoint) -> None:
    """Delete what the checkpoint just committed supersedes.

    That is: checkpoints before `newest` that the rules do not keep, and leftovers of unfinished saves before it. What
    is later than `newest`, cannot be read, or has a newer format stays. In a folder, a checkpoint with missing or cut
    files does not count among those that the rules keep.

    Args:
        storage: of the checkpoints.
        rules: which to keep.
        newest: just committed.

    Raises:
        CheckpointError: `newest` does not match its manifest; nothing was deleted.
        OSError: the storage failed; `newest` and what the rules keep are untouched.
    """
    found = {checkpoint.path.name: checkpoint for checkpoint in storage.list()}
    own = found.get(newest.path.name)
    if own is None or own.manifest != newest.manifest:
        raise CheckpointError(f"{storage.shown}/{newest.path.name} is not there as it was written: nothing is deleted")
    storage.check_sizes(own)
    complete, unreadable = _sorted_out(storage, [c for c in found.values() if c.step <= newest.step])
    before = [saved(c, rules) for c in complete]
    if rules.keep_best and not any(s.value is not None for s in before):
        log.warning(
            "checkpoint.keep_best is %s, which no checkpoint has: its manifest has %s",
            rules.keep_best,
            ", ".join(sorted(newest.manifest.get("metrics", {}))) or "no metrics yet",
        )
    kept = kept_steps(before, rules) | unreadable
    storage.tidy(own)
    failed: OSError | None = None
    for name in storage.names():
        superseded = step_of(name) < newest.step
        try:
            if superseded and (found[name].step not in kept if name in found else is_remains(storage, name)):
                storage.delete(name)
        except OSError as error:  # one that cannot be deleted, such as a link, must not keep the others
            failed = failed or error
    if failed:
        raise failed


def _sorted_out(storage: CheckpointStorage, found: Sequence[Checkpoint]) -> tuple[list[Checkpoint], set[int]]:
    """The checkpoints whose files have their sizes, and the steps of those that cannot be looked at now."""
    if storage.copies:  # each look would list the whole bucket
        return list(found), set()
    complete: list[Checkpoint] = []
    unreadable: set[int] = set()
    for checkpoint in found:
        try:
            storage.check_sizes(checkpoint)
            complete.append(checkpoint)
        except UnreadableError as error:
            log.warning("%s; it stays", error)
            unreadable.add(checkpoint.step)
        except CheckpointError as error:
            log.warning("%s: %s does not count among the checkpoints to keep", error, checkpoint.path.name)
    return complete, unreadable


def is_remains(storage: CheckpointStorage, name: str) -> bool:
    """Whether a folder not listed as a checkpoint really is not one: cut, damaged, or left by an unfinished save.

    Raises:
        OSError: it cannot be read now, so this is unknown.
    """
    content = storage.manifest(name)
    try:
        return content is None or not parse_manifest(content, name)
    except NewerFormatError:
        return False
    except ValueError:
        return True
