"""MLflow, and the only file that knows it; it is imported in the delivery process alone, never in the one that trains.

    python -m trainer.tracking deliver --run DIR     sends what is left in the spool of a run

What training calls is in `tracker` and offered here too.
"""

import argparse
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TextIO

from data.storage.redaction import redact
from trainer.tracking.delivery import Delivery, delivery_lock
from trainer.tracking.mlflow_sink import MlflowSink
from trainer.tracking.spool import Record, read_records, spool_path
from trainer.tracking.store import choose_store

log = logging.getLogger(__name__)


class _Redacted(io.TextIOBase):
    """A stream that shows no password: MLflow's and the database's own messages hold whole URIs."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str, /) -> int:
        """Pass the text on without its passwords."""
        self._stream.write(redact(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream behind."""
        self._stream.flush()


def _replay_uri(asked: str | None, is_child: bool, opening: Record, run_directory: Path) -> str:
    """Where to deliver: as asked, as the trainer says in its child's environment, or as the run was configured.

    Raises:
        ValueError: the URI held a password, which the spool does not keep.
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


def _deliver(run_directory: Path, asked_uri: str | None, timeout_s: float, parent: int | None) -> int:
    """Deliver the spool of a run. Returns the exit code: 0 if nothing is left."""
    spool = spool_path(run_directory)
    openings = [record for record in read_records(spool) if record.kind == "open"] if spool.is_file() else []
    if not openings:
        log.error("%s is no spool of a run: nothing to deliver", spool)
        return 2
    try:
        uri = _replay_uri(asked_uri, parent is not None, openings[-1], run_directory)
    except ValueError as error:
        log.error("%s", error)
        return 2
    if uri.startswith("file:"):
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # the user named it, MLflow only wants to be told so

    def trainer_lives() -> bool:
        return parent is not None and os.getppid() == parent

    # The last process of a run that just ended may still be trying.
    wait_until = time.monotonic() + timeout_s
    try:
        with delivery_lock(run_directory, lambda: trainer_lives() or time.monotonic() < wait_until):
            left = Delivery(
                run_directory,
                MlflowSink(uri, run_directory),
                target=redact(uri),
                timeout_s=timeout_s,
                trainer_lives=trainer_lives,
                # The signal's default action ends the process even inside a database driver; that loses nothing.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.tracking", description=(__doc__ or "").split("\n\n")[0])
    deliver = parser.add_subparsers(required=True).add_parser("deliver", help="send what is left in a run's spool")
    deliver.add_argument("--run", type=Path, required=True, help="run directory")
    deliver.add_argument("--timeout", type=float, default=60.0, help="give up after failing for this long, in s")
    deliver.add_argument("--uri", help="send it to this server instead of the run's own")
    deliver.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    # One quiet process beside the training: no threads of numpy's, no telemetry.
    os.environ |= {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ASYNC_LOGGING": "false"}
    if given.parent is not None:
        os.nice(10)
        # A stop signal reaches every process of a job; the records of the trainer's last steps are still to come.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with redirect_stderr(_Redacted(sys.stderr)):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        try:
            return _deliver(Path(os.path.abspath(given.run)), given.uri, given.timeout, given.parent)
        except Exception:
            log.exception("the delivery failed")
            return 1
