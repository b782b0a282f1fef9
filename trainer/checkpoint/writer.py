"""Saves checkpoints beside training: a step is held only while the state is copied into host memory.

A thread of each rank writes and hashes its part. When all parts are known good, rank 0 writes the manifest, which makes
them a checkpoint. The threads talk over a gloo group of their own: in each of them the same two exchanges follow for
each save, in the order of saves, so that they never meet those of the main threads. The second one ends the save on all
ranks: until then rank 0 deletes what is not needed any more, and nobody may write the next parts. A rank that dies
breaks its connections, and the exchange of the others fails at once instead of waiting.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from trainer.checkpoint.format import (
    FORMAT_VERSION,
    Checkpoint,
    CheckpointError,
    checkpoint_name,
    encode_manifest,
    parse_manifest,
    rank_file,
)
from trainer.checkpoint.lease import LeaseError
from trainer.checkpoint.part import HashingChunks, HostMemory, Part
from trainer.checkpoint.retention import Retention, prune
from trainer.checkpoint.storage import CheckpointStorage
from trainer.engine.interface import Fragment
from trainer.engine.ranks import Ranks

log = logging.getLogger(__name__)


T = TypeVar("T")


PAUSES_S = (1.0, 4.0)
"""Pauses before a write that failed is tried again; after the last one it is given up."""


CLOSE_S = 60.0
"""How long the end of a rank waits for a save that is under way."""


def write_part(storage: CheckpointStorage, checkpoint: str, file: str, part: Part) -> dict[str, Any]:
    """Write one file of a checkpoint; returns its size and SHA-256 as the manifest states them.

    Raises:
        OSError: it cannot be written.
    """
    chunks = HashingChunks(part)
    storage.write(checkpoint, file, chunks)
    return {"bytes": part.num_bytes, "sha256": chunks.sha256()}


def commit_parts(
    storage: CheckpointStorage, checkpoint: str, parts: Mapping[str, Part], manifest: Mapping[str, Any]
) -> None:
    """Write a checkpoint whose parts are all here.

    Raises:
        OSError: it cannot be written; there is no such checkpoint then.
    """
    files = {name: write_part(storage, checkpoint, name, part) for name, part in parts.items()}
    storage.commit(checkpoint, encode_manifest({**manifest, "files": files}))


class CheckpointWriter:
    """One rank's writer. Every rank calls `save`, `finish` and `close` alike."""

    def __init__(
        self,
        storage: CheckpointStorage,
        ranks: Ranks,
        retention: Retention,
        *,
        timeout_s: float = 1800.0,
        check_claim: Callable[[], None] = lambda: None,
        newest_step: int | None = None,
        token: str = "",
    ) -> None:
        """A collective.

        Args:
            storage: where checkpoints go.
            ranks: this rank and the others.
            retention: which ones stay when a new one is committed.
            timeout_s: how long ranks wait for one another's parts.
            check_claim: called on rank 0; raises if another run has taken the storage over.
            newest_step: of the checkpoint that the run goes on from.
            token: stands in the names of the parts; the same on all ranks, and of no other group of ranks.
        """
        self._token = token
        self._storage, self._ranks, self._retention, self._check_claim = storage, ranks, retention, check_claim
        self._group: Any = None
        if ranks.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._memory = HostMemory(ranks.device)
        self._thread: threading.Thread | None = None
        self.newest_step = newest_step
        self._error = ""
        self._refusal = ""
        self._failures = 0
        self._times: dict[str, float] = {}

    def reserve(self, num_bytes: int) -> None:
        """Have so much host memory ready when the first save comes; goes on beside the caller."""
        self._start(lambda: self._memory.reserve(num_bytes))

    def save(
        self,
        step: int,
        sections: Mapping[str, Iterable[Fragment]],
        extras: Mapping[str, Mapping[str, Tensor]],
        manifest: Mapping[str, Any],
    ) -> None:
        """Copy the state of `step` and write it beside the caller; waits for the save before to end.

        Whether it became a checkpoint is known to `finish`; a failure is in the log at once, and counted.

        Args:
            step: optimizer steps done.
            sections: fragments by section; all ranks together give each parameter once.
            extras: groups of small tensors of this rank.
            manifest: what rank 0 records beside step, world size and files.

        Raises:
            LeaseError: another run has taken the storage over; this one must end.
        """
        began = time.monotonic()
        self._wait()
        self._raise_refusal()
        part = self._memory.take(sections, extras)
        held_s = time.monotonic() - began
        self._start(lambda: self._write(step, part, manifest, began, held_s))

    def finish(self) -> tuple[int | None, str]:
        """Wait for the save that is under way. A collective.

        Returns:
            Step of the newest checkpoint, None without one; and why the last save failed, empty if it did not.

        Raises:
            LeaseError: another run has taken the storage over; this one must end.
        """
        self._wait()
        self.newest_step, self._error, self._refusal = self._ranks.broadcast(
            (self.newest_step, self._error, self._refusal)
        )
        self._raise_refusal()
        return self.newest_step, self._error

    def take_failures(self) -> int:
        """Saves that failed since the last call; rank 0 knows."""
        failures, self._failures = self._failures, 0
        return failures

    def take_times(self) -> dict[str, float]:
        """Of the last save that became a checkpoint since the last call, seconds; rank 0 knows.

        Returns:
            `held_s`, how long it held the step, and `written_s`, until it was a checkpoint; or nothing.
        """
        times, self._times = self._times, {}
        return times

    def close(self) -> bool:
        """Let go of the group, after the save that is under way; whether that one ended in time."""
        if self._thread:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                log.error("the save under way did not end in %.0f s and is given up", CLOSE_S)
                return False
        if self._group is not None:
            # The last reference joins gloo's threads: see Ranks.leave.
            dist.destroy_process_group(self._group)
            self._group = None
        return True

    def _start(self, action: Callable[[], None]) -> None:
        # A daemon: when the rank fails, the interpreter does not wait for a collective that nobody else will reach.
        self._thread = threading.Thread(target=action, name="checkpoint", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, part: Part, manifest: Mapping[str, Any], began: float, held_s: float) -> None:
        """What the thread does for one save, which began then and held the step so long. It raises nothing."""
        name = checkpoint_name(step)
        try:
            answers = self._exchange(self._write_part(name, part))
            try:
                if self._ranks.rank == 0:
                    self._commit(step, name, answers, manifest)
                    if self.newest_step == step:
                        self._times = {"held_s": held_s, "written_s": time.monotonic() - began}
            finally:
                self._exchange(None)
        except LeaseError as error:
            self._refusal = str(error)
        except Exception as error:  # a broken connection to another rank, for one
            self._fail(f"checkpoint of step {step} was not saved: {type(error).__name__}: {error}")

    def _write_part(self, name: str, part: Part) -> tuple[str, dict[str, Any], str]:
        """This rank's answer to the others: its file, size and SHA-256 of it, and what went wrong."""
        file = rank_file(self._ranks.rank, self._token)
        entry: dict[str, Any] = {}

        def write() -> None:
            entry.update(write_part(self._storage, name, file, part))

        return file, entry, self._try(write, f"{name}/{file}")

    def _try(self, action: Callable[[], None], what: str) -> str:
        """Do it, and again after a pause; what went wrong in the end."""
        for pause_s in (*PAUSES_S, None):
            try:
                action()
                return ""
            except LeaseError:
                raise
            except Exception as error:  # whatever it is, the other ranks must hear of it
                words = f"rank {self._ranks.rank} cannot write {self._storage.shown}/{what}: {error}"
                if pause_s is None:
                    return words
                log.error("%s; once more in %g s", words, pause_s)
                time.sleep(pause_s)
        return ""

    def _exchange(self, answer: T) -> list[T]:
        if self._group is None:
            return [answer]
        answers: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(answers, answer, group=self._group)
        return answers

    def _commit(
        self,
        step: int,
        name: str,
        answers: list[tuple[str, dict[str, Any], str]],
        manifest: Mapping[str, Any],
    ) -> None:
        """Rank 0 alone: the manifest, and then the room that older ones take."""
        errors = [error for _, _, error in answers if error]
        files = {file: entry for file, entry, _ in answers}
        full = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": self._ranks.world_size,
            "files": files,
            **manifest,
        }
        content = encode_manifest(full)

        def commit() -> None:
            self._check_claim()  # as late as can be: what another run has written since is not to be covered
            self._storage.commit(name, content)
            if self._storage.manifest(name) != content:
                raise OSError(f"{name} does not hold what was written to it")

        if not errors and (error := self._try(commit, f"{name}/manifest.json")):
            errors = [error]
        if errors:
            self._fail(f"checkpoint of step {step} was not saved: {'; '.join(errors)}")
            self._delete_remains(name)
            return
        before, self.newest_step, self._error = self.newest_step, step, ""
        try:
            prune(self._storage, self._retention, Checkpoint(Path(name), parse_manifest(content, name)))
        except CheckpointError as error:  # something of it has gone since it was written
            self.newest_step = before
            self._fail(f"checkpoint of step {step} was not saved: {error}")
        except OSError as error:
            log.warning("checkpoints that are not needed any more stay for now: %s", error)

    def _fail(self, error: str) -> None:
        log.error("%s", error)
        self._error = error
        self._failures += 1

    def _raise_refusal(self) -> None:
        if self._refusal:
            raise LeaseError([self._refusal])

    def _delete_remains(self, name: str) -> None:
        """What failed takes no room; the next start would pass it over in any case."""
        try:
            self._check_claim()  # another run may have written a good one of that step
            self._storage.delete(name)
        except OSError as error:
            log.warning("remains of %s stay: %s", name, error)
