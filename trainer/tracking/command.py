"""Uploads the spool of a run to its trackers; `trainer.run` starts it for a run, and this sends what a run has left:

python -m trainer.tracking deliver --run DIR
"""

import argparse
import io
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

from data.storage.errors import OperationError, as_command
from data.storage.paths import path_argument
from data.storage.redaction import HIDDEN, redact
from trainer.tracking.mlflow_sink import MlflowSink
from trainer.tracking.sink import Sink
from trainer.tracking.spool import Record, RunRecords, backends_of, spool_path
from trainer.tracking.store import (
    VARIABLE,
    Store,
    TrackingError,
    check_library,
    choose_store,
    has_store,
    secrets_of,
    tracker_uri,
)
from trainer.tracking.tensorboard_sink import TensorBoardSink
from trainer.tracking.uploader import Uploader, upload_lock
from trainer.tracking.wandb_sink import WandbSink

log = logging.getLogger(__name__)

SINKS: Mapping[str, Callable[[str, Path], Sink]] = {
    "mlflow": MlflowSink,
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
}
"""Creates the sink of each of `tracking.backends` from its URI and the run directory."""


class _Redacted(io.TextIOBase):
    """A stream that hides passwords: the messages of trackers and databases contain whole URIs.

    It never fails: what the stream's encoding lacks is written as escapes.
    """

    def __init__(self, stream: TextIO, hide: Callable[[str], str]):
        self._stream = stream
        self._hide = hide

    def write(self, text: str, /) -> int:
        """Write the text with passwords removed."""
        shown = self._hide(text)
        try:
            self._stream.write(shown)
        except UnicodeEncodeError:
            self._stream.write(shown.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self) -> None:
        """Flush the underlying stream."""
        self._stream.flush()


def _hider(asked_uri: str | None) -> Callable[[str], str]:
    """Hides secrets in a text: by their form, and those of the environment and the asked URI by their value."""
    known = {*secrets_of(asked_uri or ""), *secrets_of(os.environ.get(VARIABLE, ""))}
    secrets = sorted((secret for secret in known if len(secret) > 3), key=len, reverse=True)

    def hide(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, HIDDEN)
        return redact(text)

    return hide


def _store(asked: str | None, is_child: bool, opening: Record, run_directory: Path) -> Store:
    """The store: as requested, as given to the trainer's child in its environment, or as the run configured it.

    Raises:
        TrackingError: the URI is wrong, or had a password, which the spool does not store.
    """
    if asked or is_child:
        return choose_store(asked, run_directory, name="--uri")
    payload = opening.payload
    saved, source = payload.get("uri", ""), payload.get("uri_source", "default")
    # The directory may have been moved since, and the store next to it as well.
    saved = None if source == "default" else str(payload.get("uri_given") or saved)
    if os.environ.get(VARIABLE) and source != "config":
        saved = None
    return choose_store(saved, run_directory, name="the run's tracking URI")


def _backends(given: argparse.Namespace, opening: Record, run_directory: Path, known: Iterable[str]) -> tuple[str, ...]:
    """The trackers to send to.

    Raises:
        TrackingError: this program does not know one, its library is missing, or --uri is given without one.
    """
    backends = (given.backend,) if given.backend else tuple(dict.fromkeys(backends_of(opening.payload)))
    if given.uri:
        backends = tuple(backend for backend in backends if has_store([backend]))
        if not backends:
            raise TrackingError("--uri names an MLflow server, which this run does not report to: add --backend mlflow")
    for backend in backends:
        if backend not in known:
            raise TrackingError(
                f"{run_directory} is to be sent to {backend!r}, which this program does not know. It knows "
                f"{', '.join(known)}"
            )
        check_library(backend)
    return backends


@as_command()
def _upload(
    run_directory: Path,
    given: argparse.Namespace,
    hide: Callable[[str], str],
    sinks: Mapping[str, Callable[[str, Path], Sink]],
) -> int:
    """Upload the spool of a run, to one tracker after the other.

    Raises:
        UserError: there is no spool, or it is for a tracker that this program does not know or cannot reach as asked.
        OperationError: something is left to upload.
    """
    opening = _opening(run_directory)
    backends = _backends(given, opening, run_directory, sinks)
    store = _store(given.uri, given.parent is not None, opening, run_directory) if has_store(backends) else None
    uris = {backend: tracker_uri(backend, store, run_directory) for backend in backends}

    def trainer_lives() -> bool:
        return given.parent is not None and os.getppid() == given.parent

    # The uploader of a run that just ended may still be working.
    wait_until = time.monotonic() + given.timeout

    def may_wait() -> bool:
        return trainer_lives() or time.monotonic() < wait_until

    failures = []
    with ExitStack() as stack:
        for backend in backends:
            stack.enter_context(upload_lock(run_directory, backend, may_wait))
        if given.new_run:
            from trainer.tracking.identity import begin_new_run  # with torch, which uploading does without

            begin_new_run(run_directory)
        for backend, uri in uris.items():
            left = Uploader(
                run_directory,
                backend,
                sinks[backend](uri, run_directory),
                target=redact(uri),
                hide=hide,
                timeout_s=given.timeout,
                trainer_lives=trainer_lives,
                # The signal's default action ends the process even inside a database driver; no data is lost.
                watchdog=lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds),
            ).run()
            if left:
                failures.append(f"{left} records of {run_directory} could not be delivered to {redact(uri)}")
            else:
                log.info("all of %s is at %s", run_directory, redact(uri))
    if failures:
        raise OperationError("\n".join(failures))
    return 0


def _opening(run_directory: Path) -> Record:
    """The record with which the newest start of a run opened its spool.

    Raises:
        TrackingError: there is no such spool.
    """
    path = spool_path(run_directory)
    try:
        opening = RunRecords(path).newest
    except (OSError, ValueError):
        opening = None
    if opening is None:
        raise TrackingError(f"{path} is no spool of a run: nothing to deliver. Give a run's directory to --run")
    return opening


def main(arguments: Sequence[str] | None = None, *, sinks: Mapping[str, Callable[[str, Path], Sink]] = SINKS) -> int:
    """Run the command."""
    given = _parse(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # numpy's threads would take CPU time from the ranks
    if given.parent is not None:
        os.nice(10)
        # A stop signal reaches every process of a job, but the trainer has yet to write the records of its last steps.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hide = _hider(given.uri)
    with redirect_stderr(_Redacted(sys.stderr, hide)), redirect_stdout(_Redacted(sys.stdout, hide)):
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        try:
            return _upload(Path(os.path.abspath(given.run)), given, hide, sinks)
        except Exception:  # a bug, whose traceback may show the whole URI: it is written through the redaction
            log.exception("the upload failed")
            return 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer.tracking", description=(__doc__ or "").split("\n\n")[0])
    deliver = parser.add_subparsers(required=True).add_parser("deliver", help="send what is left in a run's spool")
    deliver.add_argument("--run", type=path_argument, required=True, help="run directory")
    deliver.add_argument("--timeout", type=float, default=60.0, help="give up after failing for this long, in s")
    deliver.add_argument(
        "--backend", help=f"send it to this tracker only, which the run need not have named: {', '.join(SINKS)}"
    )
    deliver.add_argument("--uri", help="send it to this MLflow server instead of the run's own")
    deliver.add_argument("--new-run", action="store_true", help="send everything to a new run at each tracker")
    deliver.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)
