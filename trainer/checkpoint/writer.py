"""Saves checkpoints in parallel with training; a step is blocked only while the state is copied into host memory.

A thread of each rank writes and hashes its part. When all parts are written, rank 0 commits the checkpoint by writing
the manifest. The threads use their own gloo group, with the same two exchanges for each save, in the order of saves, so
these never mix with the exchanges of the main threads. The second exchange ends the save on all ranks: until then
rank 0 deletes old checkpoints, and no rank may write its next part. If a rank dies, its connections break, and the
other ranks' exchange fails at once instead of waiting.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

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
from trainer.engine.messages import all_gather
from trainer.engine.ranks import Ranks

log = logging.getLogger(__name__)

CLOSE_S = 60.0
"""How long a rank waits at its end for a save in progress."""


def write_part(storage: CheckpointStorage, checkpoint: str, file: str, part: Part) -> dict[str, Any]:
    """Write one file of a checkpoint and read it back; returns its size and SHA-256, as in the manifest.

    Raises:
        OSError: it cannot be written.
    """
    chunks = HashingChunks(part)
    storage.write(checkpoint, file, chunks)
    storage.confirm(checkpoint, file, sha256 := chunks.sha256())
    return {"bytes": part.num_bytes, "sha256": sha256}


def commit_parts(
    storage: CheckpointStorage, checkpoint: str, parts: Mapping[str, Part], manifest: Mapping[str, Any]
) -> None:
    """Write a checkpoint whose parts are all in this process.

    Raises:
        OSError: it cannot be written; no checkpoint is created.
    """
    files = {name: write_part(storage, checkpoint, name, part) for name, part in parts.items()}
    storage.commit(checkpoint, encode_manifest({**manifest, "files": files}))


class CheckpointWriter:
    """One rank's writer. Every rank makes the same calls of `save`, `finish` and `close`."""

    def __init__(
        self,
        storage: CheckpointStorage,
        ranks: Ranks,
        retention: Retention,
        *,
        timeout_s: float = 1800.0,
        check_claim: Callable[[], None] = lambda: None,
        on_commit: Callable[[int], None] = lambda step: None,
        newest_step: int | None = None,
        token: str = "",
        pauses_s: Sequence[float] = (1.0, 4.0),
    ) -> None:
        """A collective.

        Args:
            storage: where checkpoints are written.
            ranks: this rank and the others.
            retention: which checkpoints are kept after a commit.
            timeout_s: how long ranks wait for one another's parts.
            check_claim: called on rank 0; raises if another run has taken the storage over.
            on_commit: called on rank 0 with the step of each new checkpoint, before older ones are deleted.
            newest_step: step of the checkpoint that the run resumes from.
            token: used in the names of the parts; the same on all ranks, unique to this group of ranks.
            pauses_s: pauses before a failed write is retried; after the last one the save fails.
        """
        self._pauses_s = pauses_s
        self._token = token
        self._storage, self._ranks, self._retention, self._check_claim = storage, ranks, retention, check_claim
        self._on_commit = on_commit
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
        """Allocate host memory for the first save, in the background."""
        self._start(lambda: self._memory.reserve(num_bytes))

    def save(
        self,
        step: int,
        sections: Mapping[str, Iterable[Fragment]],
        extras: Mapping[str, Mapping[str, Tensor]],
        manifest: Mapping[str, Any],
    ) -> None:
        """Copy the state of `step` and write it in the background. Waits first for the previous save to end.

        `finish` tells whether it became a checkpoint. A failure is logged and counted at once.

        Args:
            step: optimizer steps done.
            sections: fragments by section; all ranks together supply each parameter once.
            extras: groups of small tensors of this rank.
            manifest: what rank 0 records in addition to step, world size and files.

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
        """Wait for the save in progress. A collective.

        Returns:
            Step of the newest checkpoint, or None; and why the last save failed, empty if it did not.

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
        """Number of failed saves since the last call; valid on rank 0."""
        failures, self._failures = self._failures, 0
        return failures

    def take_times(self) -> dict[str, float]:
        """Times of the last successful save since the last call, in seconds; valid on rank 0.

        Returns:
            `held_s`, how long it blocked the step, and `written_s`, until it was committed; or nothing.
        """
        times, self._times = self._times, {}
        return times

    def close(self) -> bool:
        """Leave the group after the save in progress; returns whether that save ended in time."""
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
        # A daemon: when the rank fails, the interpreter must not wait for a collective that no other rank will reach.
        self._thread = threading.Thread(target=action, name="checkpoint", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, part: Part, manifest: Mapping[str, Any], began: float, held_s: float) -> None:
        """The thread's work for one save; `began` and `held_s` are its start and blocking time. Raises nothing."""
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
        except Exception as error:  # for example a broken connection to another rank
            self._fail(f"checkpoint of step {step} was not saved: {type(error).__name__}: {error}")

    def _write_part(self, name: str, part: Part) -> tuple[str, dict[str, Any], str]:
        """This rank's message to the others: its file, the file's size and SHA-256, and the error if any."""
        file = rank_file(self._ranks.rank, self._token)
        entry: dict[str, Any] = {}

        def write() -> None:
            entry.update(write_part(self._storage, name, file, part))

        return file, entry, self._try(write, f"{name}/{file}")

    def _try(self, action: Callable[[], None], what: str) -> str:
        """Do it, retrying after each pause; returns the last error."""
        for pause_s in (*self._pauses_s, None):
            try:
                action()
                return ""
            except LeaseError:
                raise
            except Exception as error:  # any error: the other ranks must receive it
                words = f"rank {self._ranks.rank} cannot write {self._storage.shown}/{what}: {error}"
                if pause_s is None:
                    return words
                log.error("%s; once more in %g s", words, pause_s)
                time.sleep(pause_s)
        return ""

    def _exchange(self, answer: Any) -> list[Any]:
        if self._group is None:
            return [answer]
        return all_gather(answer, self._group)

    def _commit(
        self,
        step: int,
        name: str,
        answers: Iterable[tuple[str, dict[str, Any], str]],
        manifest: Mapping[str, Any],
    ) -> None:
        """Rank 0 only: write the manifest, then delete old checkpoints."""
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
            self._check_claim()  # as late as possible, so as not to overwrite what another run has since written
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
        self._on_commit(step)
        try:
            prune(self._storage, self._retention, Checkpoint(Path(name), parse_manifest(content, name)))
        except CheckpointError as error:  # a file has disappeared since it was written
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
        """Delete what a failed save wrote, to free space; the next start would skip it anyway."""
        try:
            self._check_claim()  # another run may have written a valid checkpoint of that step
            self._storage.delete(name)
        except OSError as error:
            log.warning("remains of %s stay: %s", name, error)
