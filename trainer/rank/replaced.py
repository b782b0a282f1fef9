"""The list of damaged samples that were replaced: gathered from all ranks into one file of the run, kept by MLflow.

Each rank ends the run when it alone has met too many damaged samples; here those of all ranks are counted together.
"""

import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from data.storage.files import read_note
from data.stream.batches import BadSampleLimit, Replaced
from trainer.engine.ranks import Ranks
from trainer.tracking.tracker import Tracker

log = logging.getLogger(__name__)

FILE_NAME = "replaced-samples.txt"


class ReplacedSamples:
    """The names that this rank has met since the last `publish`, and, on rank 0, the file."""

    def __init__(self, run_directory: Path, ranks: Ranks, limit: BadSampleLimit) -> None:
        self._file = run_directory / FILE_NAME
        self._ranks = ranks
        self._limit = limit
        self._unpublished: dict[str, None] = {}

    def note(self, replaced: Sequence[Replaced]) -> None:
        """Record the replaced samples of a batch."""
        self._unpublished.update(dict.fromkeys(map(str, replaced)))

    def publish(self, tracker: Tracker) -> None:
        """Append new names to the file and hand it to the tracker. A collective.

        Raises:
            DataError: on every rank, if all ranks together have met more than data.max_bad_percent allows.
        """
        names = list(chain.from_iterable(self._ranks.gather(list(self._unpublished))))
        self._unpublished.clear()
        if self._ranks.rank == 0:
            self._write(names, tracker)
        self._limit.take(names)

    def _write(self, names: Sequence[str], tracker: Tracker) -> None:
        try:
            text = read_note(self._file, bytes.decode) or ""
            known = set(text.splitlines())
            new = [name for name in dict.fromkeys(names) if name not in known]
            if new:
                with self._file.open("a", encoding="utf-8") as stream:
                    stream.write("\n" if text and not text.endswith("\n") else "")  # its end was lost
                    stream.writelines(f"{name}\n" for name in new)
                tracker.log_artifact(self._file, "data")
        except OSError as error:  # the names are in the log as well, so the run can continue
            log.warning("cannot write %s: %s", self._file, error)
