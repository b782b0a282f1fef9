"""The checkpoints of one run, as a rank sees them: holding the lease, finding the newest one, saving the next."""

import math
import uuid
from collections.abc import Callable, Mapping

from trainer.checkpoint.format import Checkpoint, CheckpointError
from trainer.checkpoint.lease import LeaseError, launch_id
from trainer.checkpoint.lease_places import Claim, claim
from trainer.checkpoint.resume import ResumeError, newest_to_resume, note_saved
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.storage import fetch_for_ranks, forget_for_ranks, storage_of
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.train_config import TrainConfig
from trainer.engine.ranks import Ranks
from trainer.rank.metrics import StatisticsSum
from trainer.rank.state import TrainingState


class RunCheckpoints:
    """Every rank has one. All public methods are collectives, except `note`, `release` and take_*.

    Rank 0 holds the lease from construction to `release`.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        """Take the lease.

        Raises:
            LeaseError: on every rank, if another run writes to the directory.
            CheckpointError: `checkpoint.directory` is a URL of an unsupported storage.
        """
        self._ranks, self._config, self._checkpoint = ranks, config, config.checkpoint
        self.storage = storage_of(config)
        self._claim: Claim | None = None
        error = ""
        if ranks.rank == 0:
            try:
                self._claim = claim(config, launch_id())
            except LeaseError as raised:
                error = str(raised)
        if error := ranks.broadcast(error):
            raise LeaseError([error])
        self._timeout_s = config.scaling.timeout_s
        self._metrics: dict[str, float] = {}
        self._writer: CheckpointWriter | None = None

    def newest(self) -> Checkpoint | None:
        """The newest valid checkpoint, in a folder that this rank can read; waits for a save in progress.

        Rank 0 reads and hashes everything. If the storage is remote, one rank of every other host does too.

        Raises:
            ResumeError: on every rank, if the run has checkpoints but cannot resume; see `newest_to_resume`.
            CheckpointError: on every rank, if a host cannot download it.
        """
        if self._writer:
            self._writer.finish()
        found = fetch_for_ranks(self.storage, self._find, self._ranks, ResumeError)
        if found is None:
            return None
        self._metrics = dict(found.manifest.get("metrics", {}))
        if self._writer:
            self._writer.newest_step = found.step
        return found

    def _find(self) -> Checkpoint | None:
        try:
            return newest_to_resume(self._config, fetch=True)
        except CheckpointError as error:
            raise ResumeError(str(error)) from error

    def forget_downloads(self) -> None:
        """Delete what `newest` downloaded, once every rank has read it."""
        forget_for_ranks(self.storage, self._ranks)

    def start(self, state: TrainingState, newest_step: int | None) -> None:
        """Prepare to save.

        Args:
            state: the state that will be saved.
            newest_step: step of the checkpoint from which the run resumes, or None.
        """
        self._writer = CheckpointWriter(
            self.storage,
            self._ranks,
            Retention.of(self._checkpoint),
            timeout_s=self._timeout_s,
            check_claim=self._claim.check if self._claim else lambda: None,
            on_commit=lambda step: note_saved(self._config, step),
            newest_step=newest_step,
            token=self._ranks.broadcast(uuid.uuid4().hex[:8]),
        )
        self.prepare_for(state)

    def prepare_for(self, state: TrainingState) -> None:
        """Allocate memory for saves of this state, in the background."""
        assert self._writer, "start comes first"
        self._writer.reserve(state.expected_bytes())

    def note(self, metrics: Mapping[str, float]) -> None:
        """Record the curves' values for the manifests of later checkpoints."""
        self._metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}

    def take_failures(self) -> int:
        """Number of saves that failed since the last call; known on rank 0."""
        return self._writer.take_failures() if self._writer else 0

    def take_times(self) -> dict[str, float]:
        """See `CheckpointWriter.take_times`."""
        return self._writer.take_times() if self._writer else {}

    def save(self, state: TrainingState, statistics: StatisticsSum, step: int, mlflow_run_id: str | None) -> None:
        """Save the state after `step` in the background; see `CheckpointWriter.save`."""
        assert self._writer, "start comes first"
        sections, extras = state.parts(statistics)
        manifest = state.manifest(step, mlflow_run_id) | {"metrics": self._metrics}
        self._writer.save(step, sections, extras, manifest)

    def save_last(self, save: Callable[[], None], step: int) -> None:
        """Ensure that there is a checkpoint of `step`, the last step before the run ends.

        Args:
            save: starts saving it. Not called if the checkpoint exists, since a valid one is never overwritten.
            step: optimizer steps done.

        Raises:
            CheckpointError: on every rank, if it could not be written.
        """
        assert self._writer, "start comes first"
        newest, error = self._writer.finish()
        if newest != step:
            save()
            newest, error = self._writer.finish()
        if newest != step:
            raise CheckpointError(error)

    def close(self) -> None:
        """Finish a save in progress and release the lease; keep the lease if the save hangs and could still write."""
        if self._writer is None or self._writer.close():
            self.release()

    def release(self) -> None:
        """Release the lease; a second call does nothing."""
        if self._claim:
            self._claim.release()
