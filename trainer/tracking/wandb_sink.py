"""Weights & Biases. The only file that uses it; the library is imported only in the uploader process.

Its library takes points into a file and a process of its own, and uploads them later: the run's end is its only
confirmation. So each of our processes reads which points a run has, from the server or, offline, from those files.
Points carry the optimizer step as the curve `step`: W&B's own step would not let earlier points follow later ones.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.tracking.sink import Point, RefusedError
from trainer.tracking.spool import Record, uploader_folder

if TYPE_CHECKING:
    from wandb import Run

STEP = "step"
FINISH_S = 120.0  # for the upload of what is left at the end of a run


class WandbSink:
    """A project of W&B, on its server, on one of your own, or in files if WANDB_MODE is offline."""

    is_buffered = True

    def __init__(self, uri: str, run_directory: Path):
        """Store the place; the first `attach` connects to it.

        Args:
            uri: not used: W&B reads its own variables, WANDB_BASE_URL, WANDB_API_KEY and WANDB_ENTITY.
            run_directory: folder of the run; the library keeps its files in it.
        """
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # to W&B's own makers, through a third party
        self._folder = uploader_folder(run_directory, "wandb")
        self._init_s = 10.0
        self._opening: Record | None = None
        self._opened: Run | None = None
        self._known: dict[str, set[int]] | None = None

    def limit_requests(self, timeout_s: float) -> None:
        self._init_s = timeout_s

    def attach(self, opening: Record, run_id: str | None) -> tuple[str, bool]:
        import wandb

        if self._opening is not None:  # something failed: the library's process would hold the run's id
            self._opened = None
            wandb.teardown(1)
        self._opening, self._known = opening, None
        created = not self._run.resumed and not self._files()
        if created:
            self._known = {}
        return self._run.id, created

    def describe(self, opening: Record) -> None:
        """Set the run's config: the params, and the tags as one of its keys."""
        config = {**opening.payload.get("params", {}), "tags": dict(opening.payload.get("tags", {}))}
        self._run.config.update(config, allow_val_change=True)

    def set_status(self, status: str, at: int | None) -> None:
        """End the run, which waits for its upload. W&B knows no stopped runs: it shows them as preempted."""
        if status == "RUNNING":
            return
        run = self._run
        run.summary.update({"status": status})
        if status == "KILLED":
            run.mark_preempting()
        run.finish(exit_code=0 if status == "FINISHED" else 1)
        self._opened = None

    def known_steps(self, key: str) -> set[int]:
        return set(self._points.get(key, ()))

    def send_points(self, points: Sequence[Point]) -> None:
        for (step, at), group in itertools.groupby(points, key=lambda point: (point.step, point.at)):
            self._log(step, at, {point.key: point.value for point in group})

    def send_image(self, key: str, step: int, at: int, file: Path) -> None:
        import wandb

        if step in self._points.get(key, ()):
            return
        try:
            image = wandb.Image(str(file))
        except (OSError, ValueError) as error:
            raise RefusedError(f"{file} is no image: {error}") from error
        self._log(step, at, {key: image})

    def register_model(self, snapshot: Path, name: str) -> None:
        """Nothing: the snapshot's files are artifacts already."""

    def send_artifact(self, file: Path, folder: str | None) -> None:
        """Upload the file as an artifact of its own; W&B makes no new version of one with the same content."""
        import wandb

        name = re.sub(r"[^\w.-]", "_", f"{self._run.id}-{file.name}")
        artifact = wandb.Artifact(name, type=folder or "file")
        artifact.add_file(str(file), policy="immutable", skip_cache=True)
        logged = self._run.log_artifact(artifact)
        if not self._run.offline:
            logged.wait()

    @property
    def _run(self) -> "Run":
        """The run, opened if it is not."""
        if self._opened is None:
            import wandb

            assert self._opening is not None
            payload = self._opening.payload
            self._folder.mkdir(parents=True, exist_ok=True)
            self._opened = wandb.init(
                project=payload.get("experiment", "ddgan"),
                id=payload["uid"],
                name=payload.get("run_name"),
                dir=str(self._folder),
                resume="allow",
                settings=wandb.Settings(
                    init_timeout=math.ceil(self._init_s),
                    finish_timeout=FINISH_S,
                    finish_timeout_raises=True,
                    silent=True,
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    # The library would watch this process, which is not the one that trains.
                    x_disable_stats=True,
                    x_disable_meta=True,
                ),
            )
            self._opened.define_metric(STEP, hidden=True)
            self._opened.define_metric("*", step_metric=STEP)
        return self._opened

    @property
    def _points(self) -> dict[str, set[int]]:
        """Steps of each curve and series that the run has."""
        if self._known is None:
            self._known = {}
            for row in self._rows():
                self._note(row)
        return self._known

    def _log(self, step: int, at: int, values: dict[str, Any]) -> None:
        row = {STEP: step, **values}
        self._run.log({"_timestamp": at / 1000, **row})
        if self._known is not None:
            self._note(row)

    def _note(self, row: dict[str, Any]) -> None:
        assert self._known is not None
        if isinstance(step := row.get(STEP), int | float):
            for key in row:
                self._known.setdefault(key, set()).add(int(step))

    def _rows(self) -> Iterable[dict[str, Any]]:
        import wandb

        run = self._run
        if run.offline:
            return itertools.chain.from_iterable(read_rows(file) for file in self._files())
        path = f"{run.entity}/{run.project}/{run.id}"
        return wandb.Api(timeout=math.ceil(self._init_s)).run(path).scan_history()

    def _files(self) -> list[Path]:
        """The files in which the library kept the run offline, without the open one."""
        assert self._opening is not None
        own = f"run-{self._opening.payload['uid']}.wandb"
        found = sorted(self._folder.glob(f"wandb/offline-run-*/{own}"))
        return [file for file in found if self._opened is None or file.parent.name not in self._opened.dir]


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of curves in a file of the library, up to where it was killed."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    messages: Any = wandb_internal_pb2  # protobuf makes its classes when it is imported
    store = DataStore()
    try:
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            message = messages.Record.FromString(data)
            if message.WhichOneof("record_type") == "history":
                items = message.history.item
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    except AssertionError:  # how the library tells a record that is not whole
        return
