"""MLflow. The only file that uses it; the library is imported only in the uploader process."""

import math
import os
import re
import shlex
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.tracking.database import ARTIFACTS, open_database
from trainer.tracking.sink import Point, RefusedError, RunGoneError
from trainer.tracking.spool import Record
from trainer.tracking.store import database_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


MAX_VALUE_LENGTH = 6000  # of a param; MLflow allows 8000 for tags
MAX_KEY_LENGTH = 250
MAX_LABELS = 100  # params or tags per request
MAX_POINTS = 500  # per request, which is limited to 1000 entities and 1 MB
THUMBNAIL_PIXELS = 256
UID_TAG = "run_uid"
SNAPSHOT_TAG = "snapshot"
MODEL_CODE = "trainer.sample.pyfunc"
"""Module that MLflow calls to load a registered snapshot."""
MODEL_PACKAGES = ("models", "data", "trainer")
"""Our packages that it imports."""
MODEL_NEEDS = (
    *("annotated-types", "fsspec", "jaxtyping", "numpy", "pillow", "pydantic", "pyyaml", "rich", "safetensors"),
    *("simplejpeg", "tenacity", "torch", "webdataset"),
)
"""Distributions that it imports."""


class MlflowSink:
    """An MLflow tracking server, or a database or folder that MLflow uses as one."""

    is_buffered = False

    def __init__(self, uri: str, run_directory: Path):
        """Store the target; the first `attach` connects to it.

        Args:
            uri: tracking URI.
            run_directory: folder of the run; a bare database keeps its artifacts next to it.
        """
        os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ASYNC_LOGGING": "false"}
        if uri.startswith("file:"):
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # MLflow requires this; the user chose the file store
        self._uri = uri
        self._run_directory = run_directory
        self._connected: MlflowClient | None = None
        self._run_id = ""

    def limit_requests(self, timeout_s: float) -> None:
        # MLflow reads these variables at each request. The uploader retries, so MLflow must not.
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(math.ceil(timeout_s))
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"

    def attach(self, opening: Record, run_id: str | None) -> tuple[str, bool]:
        # The id of a checkpoint is used where tracking/ was removed: then a deleted run is not to be brought back.
        for candidate, wanted in ((run_id, True), (opening.payload.get("run_id"), False)):
            if candidate and self._exists(candidate, wanted=wanted):
                self._run_id = candidate
                return candidate, False
        experiment_id = self._experiment(opening.payload.get("experiment", "ddgan"))
        uid = opening.payload["uid"]
        found = self._client.search_runs(
            [experiment_id], f"tags.{UID_TAG} = '{uid}'", max_results=1, order_by=["attributes.start_time ASC"]
        )
        run = found[0] if found else None
        if run is None:
            run = self._client.create_run(
                experiment_id, start_time=opening.at, tags={UID_TAG: uid}, run_name=opening.payload.get("run_name")
            )
        self._run_id = run.info.run_id
        return self._run_id, not found

    def describe(self, opening: Record) -> None:
        """Log params and tags. MLflow's params cannot change: a changed one becomes the tag resumed/<step>/<key>."""
        from mlflow.entities import Param, RunTag

        with self._translated():
            there = self._client.get_run(self._run_id).data
            prefix = f"resumed/{opening.step or 0}/"
            params: dict[str, str] = {}
            tags: dict[str, str] = {}
            for given, known, fresh in (
                (opening.payload.get("params", {}), there.params, params),
                (opening.payload.get("tags", {}), there.tags, tags),
            ):
                for name, text in given.items():
                    key, value = _legal(name), _cut(text)
                    if key not in known:
                        fresh[key] = value
                    elif known[key] != value:
                        tags[(prefix + key)[:MAX_KEY_LENGTH]] = value
            for some in _chunks([Param(key, value) for key, value in params.items()], MAX_LABELS):
                self._client.log_batch(self._run_id, params=some)
            for some in _chunks([RunTag(key, value) for key, value in tags.items()], MAX_LABELS):
                self._client.log_batch(self._run_id, tags=some)

    def set_status(self, status: str, at: int | None) -> None:
        with self._translated():
            if at is None:
                self._client.update_run(self._run_id, status=status)
            else:
                self._client.set_terminated(self._run_id, status=status, end_time=at)

    def known_steps(self, key: str) -> set[int]:
        with self._translated():
            return {metric.step for metric in self._client.get_metric_history(self._run_id, _legal(key))}

    def send_points(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(_legal(point.key), point.value, point.at, point.step) for point in points]
        with self._translated():
            for some in _chunks(metrics, MAX_POINTS):
                self._client.log_batch(self._run_id, metrics=some)

    def send_image(self, key: str, step: int, at: int, file: Path) -> None:
        """Send an image as MLflow's log_image does, but with the same name at each attempt.

        MLflow puts a random uuid in the name, so an image sent twice would be shown twice.
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
        with self._translated():
            self._client.log_artifact(self._run_id, str(file), folder)

    def register_model(self, snapshot: Path, name: str) -> None:
        """Upload the snapshot with the code that draws, and make it a version. The code is loaded without a pickle."""
        with self._translated():
            if any(
                version.run_id == self._run_id and version.tags.get(SNAPSHOT_TAG) == snapshot.name
                for version in self._versions(name)
            ):
                return
            folder = f"model-{snapshot.name}"
            with tempfile.TemporaryDirectory() as temporary:
                model = Path(temporary) / "model"
                _save_pyfunc(snapshot, model)
                self._client.log_artifacts(self._run_id, str(model), folder)
            source = f"{self._client.get_run(self._run_id).info.artifact_uri}/{folder}"
            tags = {SNAPSHOT_TAG: snapshot.name}
            self._client.create_model_version(name, source, self._run_id, tags, await_creation_for=0)

    def _versions(self, name: str) -> "Sequence[ModelVersion]":
        """The versions of a model that belong to this run; makes the model if it is not there."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self._client.search_model_versions(f"name='{name}' and run_id='{self._run_id}'")

    @property
    def _client(self) -> "MlflowClient":
        if self._connected is None:
            from mlflow import MlflowClient

            def connect(uri: str) -> MlflowClient:
                client = MlflowClient(tracking_uri=uri)
                client.search_experiments(max_results=1)  # makes the tables, or checks them
                return client

            file = database_file(self._uri)
            self._connected = open_database(self._uri, file, connect) if file else MlflowClient(self._uri)
        return self._connected

    def _exists(self, run_id: str, *, wanted: bool = True) -> bool:
        """Whether the server has the run; one in the bin counts, and is an error, only if it is wanted."""
        from mlflow.exceptions import MlflowException

        try:
            with self._let_in():
                run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        if run.info.lifecycle_stage == "active":
            return True
        if not wanted:
            return False
        raise RuntimeError(
            f"the run was deleted: `mlflow runs restore --run-id {run_id}` brings it back, or `mlflow experiments "
            f"restore --experiment-id {run.info.experiment_id}` with its experiment; for a new run with all curves: "
            f"python -m trainer.tracking deliver --new-run --run {shlex.quote(str(self._run_directory))}"
        )

    def _experiment(self, name: str) -> str:
        with self._let_in():
            known = self._client.get_experiment_by_name(name)
        if known is not None:
            if known.lifecycle_stage != "active":
                raise RuntimeError(
                    f"the experiment {name} was deleted: `mlflow experiments restore --experiment-id "
                    f"{known.experiment_id}` brings it back, or set tracking.experiment to another name"
                )
            return known.experiment_id
        root = artifact_root(self._uri, self._run_directory)
        folder = None if root is None else (root / re.sub(r"[^\w.-]+", "_", name)).as_uri()
        return self._client.create_experiment(name, artifact_location=folder)

    @contextmanager
    def _let_in(self) -> Iterator[None]:
        """Name a refused user in words; servers answer with pages of HTML."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.get_http_status_code() in (401, 403) or re.search(r"error code 40[13]\b", str(error)):
                raise PermissionError(
                    "the tracking server refuses this user (401 or 403): set MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
                ) from error
            raise

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Separate errors for which a retry is useless from the others."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RunGoneError(str(error)) from error
            # MLflow reports the same error for a deleted run, which can be restored.
            if error.error_code == "INVALID_PARAMETER_VALUE" and self._exists(self._run_id):
                raise RefusedError(str(error)) from error
            raise


def _save_pyfunc(snapshot: Path, model: Path) -> None:
    """Write the snapshot as a model of the flavour pyfunc, whose code is `trainer.sample.pyfunc`."""
    from importlib.metadata import version

    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema, TensorSpec
    from numpy import dtype

    root = Path(__file__).resolve().parents[2]
    columns: list[ColSpec | TensorSpec] = [ColSpec("long", "seed"), ColSpec("long", "class", required=False)]
    images = TensorSpec(dtype("uint8"), (-1, -1, -1, -1), "images")
    mlflow.pyfunc.save_model(
        str(model),
        loader_module=MODEL_CODE,
        data_path=str(snapshot),
        code_paths=[str(root / package) for package in MODEL_PACKAGES],
        pip_requirements=[f"{name}=={version(name)}" for name in MODEL_NEEDS],
        signature=ModelSignature(inputs=Schema(columns), outputs=Schema([images])),
    )


def artifact_root(uri: str, run_directory: Path) -> Path | None:
    """Artifact folder if the store is a bare database, next to it if it is a file; None: the server decides.

    MLflow itself would use `mlruns` in the current folder.
    """
    if file := database_file(uri):
        return file.parent / ARTIFACTS
    if re.match(r"(postgresql|mysql|mssql)\b", uri):
        return Path(os.path.abspath(run_directory)).parent / ARTIFACTS
    return None


def _legal(name: str) -> str:
    """Replace characters that MLflow refuses in names."""
    return re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII)[:MAX_KEY_LENGTH]


def _cut(value: str) -> str:
    return value if len(value) <= MAX_VALUE_LENGTH else value[: MAX_VALUE_LENGTH - 3] + "..."


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
