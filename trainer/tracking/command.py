"""Uploads the spool of a run; `trainer.run` starts it for a run, and this sends what a run has left:

python -m trainer.tracking deliver --run DIR
"""

import argparse
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TextIO

from data.storage.redaction import redact
from trainer.config.paths import path_argument
from trainer.tracking.mlflow_sink import MlflowSink
from trainer.tracking.sink import Sink
from trainer.tracking.spool import Record, read_records, spool_path
from trainer.tracking.store import choose_store
from trainer.tracking.uploader import Uploader, upload_lock

log = logging.getLogger(__name__)

SINKS: Mapping[str, Callable[[str, Path], Sink]] = {"mlflow": MlflowSink}
"""Creates the sink of each `tracking.backend` from the tracking URI and the run directory."""


class _Redacted(io.TextIOBase):
    """A stream that hides passwords: the messages of trackers and databases contain whole URIs."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str, /) -> int:
        """Write the text with passwords removed."""
        self._stream.write(redact(text))
        return len(text)

    def flush(self) -> None:
        """Flush the underlying stream."""
        self._stream.flush()


def _target_uri(asked: str | None, is_child: bool, opening: Record, run_directory: Path) -> str:
    """The upload target: as requested, as given to the trainer's child in its environment, or as the run configured it.

    Raises:
        ValueError: the URI had a password, which the spool does not store.
    """
    if asked or is_child:
        return choose_store(asked, run_directory).uri
    saved = str(opening.payload["uri"])
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if named and (opening.payload["uri_source"] != "config" or redact(named) == saved):
        return choose_store(named, run_directory).uri
    if "***" in saved:
        raise ValueError(
            f"the run goes to {saved}, and its password is not kept in the spool: "
            "set MLFLOW_TRACKING_URI to the whole URI and run this again"
        )
    return saved


def _upload(
    run_directory: Path,
    asked_uri: str | None,
    timeout_s: float,
    parent: int | None,
    sinks: Mapping[str, Callable[[str, Path], Sink]],
) -> int:
    """Upload the spool of a run. Returns the exit code: 0 if nothing is left to upload."""
    spool = spool_path(run_directory)
    openings = [record for record in read_records(spool) if record.kind == "open"] if spool.is_file() else []
    if not openings:
        log.error("%s is no spool of a run: nothing to deliver", spool)
        return 2
    opening = openings[-1]
    try:
        uri = _target_uri(asked_uri, parent is not None, opening, run_directory)
    except ValueError as error:
        log.error("%s", error)
        return 2
    sink = sinks[opening.payload.get("backend", "mlflow")](uri, run_directory)

    def trainer_lives() -> bool:
        return parent is not None and os.getppid() == parent

    # The uploader of a run that just ended may still be working.
    wait_until = time.monotonic() + timeout_s
    try:
        with upload_lock(run_directory, lambda: trainer_lives() or time.monotonic() < wait_until):
            left = Uploader(
                run_directory,
                sink,
                target=redact(uri),
                timeout_s=timeout_s,
                trainer_lives=trainer_lives,
                # The signal's default action ends the process even inside a database driver; no data is lost.
                watchdog=lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds),
            ).run()
    except BlockingIOError as error:
        log.error("%s", error)
        return 1
    if left:
        log.error("%d records of %s could not be delivered to %s", left, run_directory, redact(uri))
        return 1
    log.info("all of %s is at %s", run_directory, redact(uri))
    return 0


def main(arguments: Sequence[str] | None = None, *, sinks: Mapping[str, Callable[[str, Path], Sink]] = SINKS) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.tracking", description=(__doc__ or "").split("\n\n")[0])
    deliver = parser.add_subparsers(required=True).add_parser("deliver", help="send what is left in a run's spool")
    deliver.add_argument("--run", type=path_argument, required=True, help="run directory")
    deliver.add_argument("--timeout", type=float, default=60.0, help="give up after failing for this long, in s")
    deliver.add_argument("--uri", help="send it to this server instead of the run's own")
    deliver.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # numpy's threads would take CPU time from the ranks
    if given.parent is not None:
        os.nice(10)
        # A stop signal reaches every process of a job, but the trainer has yet to write the records of its last steps.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with redirect_stderr(_Redacted(sys.stderr)):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        try:
            return _upload(Path(os.path.abspath(given.run)), given.uri, given.timeout, given.parent, sinks)
        except Exception:
            log.exception("the upload failed")
            return 1
