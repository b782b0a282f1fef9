"""MLflow, and the only file that knows it; it is imported in the delivery process alone, never in the one that trains.

    python -m trainer.tracking deliver --run DIR     sends what is left in the spool of a run

What training calls is in `tracker` and offered here too.
"""

import argparse
import io
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trainer.delivery import Delivery, delivery_lock
from trainer.provenance import collect_tags
from trainer.spool import Record, read_records, spool_path
from trainer.tracker import MlflowTracker, NullTracker, Tracker, open_tracker
from trainer.tracking_sink import Point, RefusedError, RunGoneError
from trainer.tracking_store import artifact_root, choose_store, redact, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["MlflowTracker", "NullTracker", "Tracker", "collect_tags", "open_tracker", "redact", "tracking_uri"]

log = logging.getLogger(__name__)

MAX_VALUE_LENGTH = 6000  # of a param; MLflow's tags take 8000
MAX_KEY_LENGTH = 250
MAX_PER_REQUEST = 100
THUMBNAIL_PIXELS = 256
UID_TAG = "run_uid"


class MlflowSink:
    """An MLflow tracking server, or a database that stands for one."""

    def __init__(self, uri: str, run_directory: Path):
        """Remember the store; the first `attach` goes there.

        Args:
            uri: tracking URI.
            run_directory: folder of the run, beside which a bare database keeps its artifacts.
        """
        self._uri = uri
        self._run_directory = run_directory
        self._connected: MlflowClient | None = None
        self._run_id = ""

    def limit_requests(self, timeout_s: float) -> None:
        """MLflow reads its time limit from the environment at each request; `delivery` retries, so MLflow must not."""
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(math.ceil(timeout_s))
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"

    def attach(self, opening: Record, run_id: str | None) -> tuple[str, bool]:
        """Find the run by its id or by the tag that holds our uid, or create it."""
        for candidate in (run_id, opening.payload["run_id"]):
            if candidate and self._exists(candidate):
                self._run_id = candidate
                return candidate, False
        experiment_id = self._experiment(opening.payload["experiment"])
        uid = opening.payload["uid"]
        found = self._client.search_runs(
            [experiment_id], f"tags.{UID_TAG} = '{uid}'", max_results=1, order_by=["attributes.start_time ASC"]
        )
        run = found[0] if found else None
        if run is None:
            run = self._client.create_run(
                experiment_id, start_time=opening.at, tags={UID_TAG: uid}, run_name=opening.payload["run_name"]
            )
        self._run_id = run.info.run_id
        return self._run_id, not found

    def describe(self, opening: Record) -> None:
        """Log params and tags. MLflow's params cannot change: one that did becomes the tag resumed/<step>/<key>."""
        from mlflow.entities import Param, RunTag

        with self._translated():
            there = self._client.get_run(self._run_id).data
            prefix = f"resumed/{opening.step or 0}/"
            params: dict[str, str] = {}
            tags: dict[str, str] = {}
            for given, known, fresh in (
                (opening.payload["params"], there.params, params),
                (opening.payload["tags"], there.tags, tags),
            ):
                for name, text in given.items():
                    key, value = _legal(name), _cut(text)
                    if key not in known:
                        fresh[key] = value
                    elif known[key] != value:
                        tags[(prefix + key)[:MAX_KEY_LENGTH]] = value
            for some in _chunks([Param(key, value) for key, value in params.items()]):
                self._client.log_batch(self._run_id, params=some)
            for some in _chunks([RunTag(key, value) for key, value in tags.items()]):
                self._client.log_batch(self._run_id, tags=some)

    def set_status(self, status: str, at: int | None) -> None:
        """Set the run's status; with an end time if it has ended."""
        with self._translated():
            if at is None:
                self._client.update_run(self._run_id, status=status)
            else:
                self._client.set_terminated(self._run_id, status=status, end_time=at)

    def known_steps(self, key: str) -> set[int]:
        """Steps at which the server has a point of this curve."""
        with self._translated():
            return {metric.step for metric in self._client.get_metric_history(self._run_id, _legal(key))}

    def send_points(self, points: Sequence[Point]) -> None:
        """Send metrics in one request."""
        from mlflow.entities import Metric

        metrics = [Metric(_legal(point.key), point.value, point.at, point.step) for point in points]
        with self._translated():
            self._client.log_batch(self._run_id, metrics=metrics)

    def send_image(self, key: str, step: int, at: int, file: Path) -> None:
        """Send an image as MLflow's log_image does, but under a name that is the same at each attempt.

        MLflow puts a random uuid in the name, so that an image sent twice would be shown twice.
        """
        from PIL import Image

        fixed = uuid.uuid5(uuid.NAMESPACE_OID, f"{self._run_id}/{key}/{step}")
        name = f"{_legal(key).replace('/', '~').replace(':', '_')}+step+{step}+timestamp+{at}+{fixed}"
        with tempfile.TemporaryDirectory() as folder:
            full, small = Path(folder) / f"{name}.png", Path(folder) / f"{name}+compressed.webp"
            try:
                with Image.open(file) as image:
                    if image.format == "PNG":
                        shutil.copyfile(file, full)
                    else:
                        image.save(full)
                    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
                    image.save(small)
            except (OSError, ValueError) as error:
                raise RefusedError(f"{file} is no image: {error}") from error
            with self._translated():
                self._client.log_artifact(self._run_id, str(full), "images")
                self._client.log_artifact(self._run_id, str(small), "images")
                self._client.set_tag(self._run_id, "mlflow.loggedImages", True)

    def send_artifact(self, file: Path, folder: str | None) -> None:
        """Send a file."""
        with self._translated():
            self._client.log_artifact(self._run_id, str(file), folder)

    @property
    def _client(self) -> "MlflowClient":
        if self._connected is None:
            from mlflow import MlflowClient

            self._connected = MlflowClient(tracking_uri=self._uri)
        return self._connected

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        if run.info.lifecycle_stage != "active":
            raise RuntimeError(f"the run was deleted; `mlflow runs restore --run-id {run_id}` brings it back")
        return True

    def _experiment(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        if known is not None:
            return known.experiment_id
        root = artifact_root(self._uri, self._run_directory)
        folder = None if root is None else (root / re.sub(r"[^\w.-]+", "_", name)).as_uri()
        return self._client.create_experiment(name, artifact_location=folder)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Tell the errors that sending again would not cure from the others."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RunGoneError(str(error)) from error
            # MLflow says the same of a run in the bin, which can be taken out of it.
            if error.error_code == "INVALID_PARAMETER_VALUE" and self._exists(self._run_id):
                raise RefusedError(str(error)) from error
            raise


def _legal(name: str) -> str:
    """A name that MLflow takes for a param, tag, metric or image."""
    return re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII)[:MAX_KEY_LENGTH]


def _cut(value: str) -> str:
    return value if len(value) <= MAX_VALUE_LENGTH else value[: MAX_VALUE_LENGTH - 3] + "..."


def _chunks(items: list[Any]) -> Iterator[list[Any]]:
    return (items[start : start + MAX_PER_REQUEST] for start in range(0, len(items), MAX_PER_REQUEST))


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


if __name__ == "__main__":
    sys.exit(main())
