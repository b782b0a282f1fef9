"""How rank 0 reports a run: it appends to a local spool, which a process for each tracker uploads to it.

Nothing here imports a tracker's library or opens a connection, so nothing here can block on a server.
"""

import logging
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data.storage.files import read_note, replaced
from data.storage.redaction import redact
from trainer.tracking.identity import bind, reason_for_new_run
from trainer.tracking.spool import Progress, Spool, Status, count_left, load_progress, uploader_folder
from trainer.tracking.store import choose_store, has_store, tracker_uri

if TYPE_CHECKING:
    from trainer.config.sections import TrackingConfig

log = logging.getLogger(__name__)

STOPPED_FLUSH_S = 5.0
"""Longest wait for the server at the end of a stopped run."""
_UTF8 = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
"""MLflow prints text that a latin-1 or ASCII locale cannot write, and would fail."""


class UploaderProcess:
    """The process that uploads the spool of a run to one tracker: a child that shares only the run's folder with this
    process. A tracker that hangs or crashes takes neither the run nor another tracker with it.

    Attributes:
        backend: the tracker.
        shown_uri: where it is, without password; also the key of its progress.
    """

    def __init__(
        self,
        run_directory: Path,
        backend: str,
        uri: str,
        timeout_s: float,
        *,
        module: Sequence[str] = ("-m", "trainer.tracking"),
    ):
        """Prepare the process; `start` starts it.

        Args:
            run_directory: folder of the run.
            backend: the tracker.
            uri: where it is, passed in the environment, since every user can read a process's arguments.
            timeout_s: how long the process keeps trying after this one has closed the spool or died.
            module: module that Python runs; it takes the arguments of `trainer.tracking`.
        """
        self._directory = Path(os.path.abspath(run_directory))
        self.backend = backend
        self.shown_uri = redact(uri)
        self._uri = uri
        self._timeout_s = timeout_s
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process ID."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process. A failure is logged; `keep_alive` tries again."""
        arguments = ["--run", str(self._directory), "--backend", self.backend, "--timeout", str(self._timeout_s)]
        arguments += ["--parent", str(os.getpid())]
        # The child must find this package from any folder; a Ray worker's current folder is a temporary one.
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        folder = uploader_folder(self._directory, self.backend)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "delivery.log").open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, *self._module, "deliver", *arguments],
                    env={**os.environ, **_UTF8, "MLFLOW_TRACKING_URI": self._uri, "PYTHONPATH": path},
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        except OSError as error:
            log.warning("metrics wait in the spool: the uploader to %s does not start: %s", self.backend, error)

    def keep_alive(self) -> None:
        """Restart the process if it died."""
        if self._process is None or self._process.poll() is not None:
            self.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the process, which ends when all is uploaded. Returns whether it ended with nothing left."""
        until = time.monotonic() + timeout_s
        if self._process is None or self._process.poll() not in (None, 0):
            self.start()
        while self._process is not None:
            try:
                code = self._process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
            if code >= 0 or time.monotonic() >= until:
                return code == 0
            self.start()  # killed by a signal, perhaps just before this wait
        return False


class Tracker(Protocol):
    """Where rank 0 reports a run. No method raises or waits because of a server."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until it is known, and without MLflow."""
        ...

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one point of each curve; a curve's second point at a step is dropped."""
        ...

    def log_image(self, step: int, key: str, path: Path) -> None:
        """Log a file of the run directory as the image of a step; it must stay at its path."""
        ...

    def log_artifact(self, path: Path, folder: str | None = None, register_as: str | None = None) -> None:
        """Log a file of the run directory as an artifact; it must stay at its path.

        Args:
            path: the file.
            folder: of the run's artifacts; None: their root.
            register_as: name of a model, of which the snapshot that the file completes becomes a version.
        """
        ...

    def close(self, status: Status) -> None:
        """End this process's part of the run; waits at most the configured time for the server."""
        ...


class NullTracker:
    """The tracker of a run that is not tracked: every method does nothing."""

    run_id: str | None = None
    """Always None, since there is no tracker."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_image(self, step: int, key: str, path: Path) -> None: ...

    def log_artifact(self, path: Path, folder: str | None = None, register_as: str | None = None) -> None: ...

    def close(self, status: Status) -> None: ...


class SpoolTracker:
    """Appends to the spool and keeps the uploader processes alive."""

    def __init__(
        self,
        run_directory: Path,
        spool: Spool,
        uploaders: Sequence[UploaderProcess],
        *,
        flush_timeout_s: float,
        watch_s: float,
    ):
        """Use an open spool and started uploaders; `open_tracker` creates them."""
        self._directory = run_directory
        self._spool = spool
        self._uploaders = uploaders
        self._flush_timeout_s = flush_timeout_s
        self._watch_s = watch_s
        self._watched = time.monotonic()
        self._troubled: set[str] = set()
        self._closed = False

    @property
    def run_id(self) -> str | None:
        found = (self._progress(uploader).run_id for uploader in self._uploaders if uploader.backend == "mlflow")
        return next(found, None)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._closed:
            self._spool.metrics(step, metrics)
            self._watch()

    def log_image(self, step: int, key: str, path: Path) -> None:
        if not self._closed:
            self._spool.image(step, key, path)

    def log_artifact(self, path: Path, folder: str | None = None, register_as: str | None = None) -> None:
        if not self._closed:
            self._spool.artifact(path, folder, register_as)

    def close(self, status: Status) -> None:
        if self._closed:
            return
        self._closed = True
        self._spool.close(status)
        # A stopped run has little time to end, and the start that resumes it uploads the rest.
        limit_s = STOPPED_FLUSH_S if status == "KILLED" else math.inf
        until = time.monotonic() + min(self._flush_timeout_s, limit_s)
        for uploader in self._uploaders:  # all of them work meanwhile
            self._say_what_is_left(uploader, uploader.wait(max(0.0, until - time.monotonic())))

    def _say_what_is_left(self, uploader: UploaderProcess, done: bool) -> None:
        noted = self._progress(uploader)
        if noted.refused:
            log_file = uploader_folder(self._directory, uploader.backend) / "delivery.log"
            log.warning("%s took all but %d records, see %s", uploader.backend, noted.refused, log_file)
        waiting = count_left(self._spool.path, noted)
        if waiting and not done:
            log.warning(
                "%d records of the run are not at %s yet%s. They are safe in %s; to send them: "
                "python -m trainer.tracking deliver --run %s",
                waiting,
                uploader.shown_uri,
                f" ({noted.problem})" if noted.problem else "",
                self._spool.path,
                shlex.quote(str(self._directory)),
            )

    def _progress(self, uploader: UploaderProcess) -> Progress:
        return load_progress(self._directory, uploader.backend, uploader.shown_uri, self._spool.uid)

    def _watch(self) -> None:
        """Check the uploaders from time to time; this is local and fast."""
        if time.monotonic() - self._watched < self._watch_s:
            return
        self._watched = time.monotonic()
        for uploader in self._uploaders:
            uploader.keep_alive()
            trouble = self._progress(uploader).problem
            if trouble and uploader.backend not in self._troubled:
                self._troubled.add(uploader.backend)
                where, wait_in = uploader.shown_uri, self._spool.path
                log.warning("%s, %s: %s. Metrics wait in %s", uploader.backend, where, trouble, wait_in)
            elif not trouble and uploader.backend in self._troubled:
                self._troubled.remove(uploader.backend)
                log.info("%s, %s, is back", uploader.backend, uploader.shown_uri)


def open_tracker(
    config: "TrackingConfig",
    run_directory: Path,
    *,
    params: Mapping[str, Any],
    config_yaml: str,
    tags: Mapping[str, str],
    run_name: str,
    last_step: int | None,
    run_id: str | None = None,
    uploader: Callable[[Path, str, str, float], UploaderProcess] = UploaderProcess,
    watch_s: float = 30.0,
) -> Tracker:
    """Start or continue reporting a run. For rank 0 only.

    Args:
        config: the user's settings.
        run_directory: folder of the run; the folder identifies the run.
        params: the resolved config, flat.
        config_yaml: the resolved config as YAML text, stored as a file.
        tags: the origin of the run, see `collect_tags`.
        run_name: the run's name at the trackers.
        last_step: step of the checkpoint that the run resumes from.
        run_id: MLflow's id of the run, from that checkpoint. Needed only if `tracking/` was lost.
        uploader: creates the process that uploads, from run directory, tracker, its URI and timeout in s.
        watch_s: seconds between two checks of the uploaders, which restart those that died.
    """
    if not config.backends:
        return NullTracker()
    run_directory = Path(os.path.abspath(run_directory))
    store = choose_store(config.uri, run_directory) if has_store(config.backends) else None
    try:
        spool = Spool(run_directory, last_step=last_step)
    except OSError as error:
        log.warning("the run is not tracked: %s", error)
        return NullTracker()
    shown_params = {key: redact(str(value)) for key, value in params.items()}
    shown_tags = {key: redact(str(value)) for key, value in tags.items()}
    reason = reason_for_new_run(
        run_directory,
        spool,
        last_step=last_step,
        experiment=config.experiment,
        params=shown_params,
        tags=shown_tags,
    )
    is_first = spool.former is None or (reason is not None and last_step is None)
    if reason:
        spool.begin_new_run()
        run_id = None
        log.warning("a new run begins at the trackers: %s", reason)
    try:
        bind(run_directory, spool.uid)
        config_file = _keep_config(spool.path.parent, redact(config_yaml), None if is_first else last_step or 0)
    except OSError as error:
        log.warning("the run is not tracked: %s", error)
        return NullTracker()
    spool.open(
        step=last_step,
        run_id=run_id,
        run_name=run_name,
        backends=config.backends,
        experiment=config.experiment,
        uri=redact(store.uri) if store else "",
        uri_source=store.source if store else "default",
        uri_given=redact(store.given) if store and store.given else None,
        params=shown_params,
        tags=shown_tags,
    )
    spool.artifact(config_file, None)
    uploaders = [
        uploader(run_directory, backend, tracker_uri(backend, store, run_directory), config.flush_timeout_s)
        for backend in config.backends
    ]
    for process in uploaders:
        process.start()
    return SpoolTracker(run_directory, spool, uploaders, flush_timeout_s=config.flush_timeout_s, watch_s=watch_s)


def _keep_config(folder: Path, text: str, resumed_step: int | None) -> Path:
    """Write the run's config, or the resumed run's if it differs; a file with the same content is not touched."""
    path = folder / "config.yaml"
    found = read_note(path, bytes.decode)
    if resumed_step is not None and found not in (None, text):
        path = folder / f"config-resumed-{resumed_step}.yaml"
        found = read_note(path, bytes.decode)
    if found != text:
        with replaced(path) as draft:
            draft.write_text(text, encoding="utf-8")
    return path
