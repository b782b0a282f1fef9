"""A second tracker, in one file: a server that is a file of JSON lines, one for each call.

`python -m tests.trainer.tracking.helpers.jsonl_sink deliver ...` uploads to it as `trainer.tracking` does to MLflow.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.tracking.command import SINKS, main
from trainer.tracking.sink import Point
from trainer.tracking.spool import Record


class JsonLinesSink:
    """Appends each line in one write; points come one a line, so that a kill can fall between two of a batch."""

    is_buffered = False

    def __init__(self, uri: str, run_directory: Path):
        self._path = Path(urlsplit(uri).path)
        self._run = ""

    def limit_requests(self, timeout_s: float) -> None:
        pass

    def attach(self, opening: Record, run_id: str | None) -> tuple[str, bool]:
        run = self._run = opening.payload["uid"]
        created = not any(line["call"] == "create" and line["run"] == run for line in read_lines(self._path))
        if created:
            self._write("create", run=run, name=opening.payload.get("run_name"))
        return run, created

    def describe(self, opening: Record) -> None:
        self._write("describe", params=opening.payload.get("params", {}), tags=opening.payload.get("tags", {}))

    def set_status(self, status: str, at: int | None) -> None:
        self._write("status", status=status)

    def known_steps(self, key: str) -> set[int]:
        points = [line for line in read_lines(self._path) if line["call"] == "point" and line["run"] == self._run]
        return {line["step"] for line in points if line["key"] == key}

    def send_points(self, points: Sequence[Point]) -> None:
        for point in points:
            self._write("point", run=self._run, key=point.key, step=point.step, value=point.value)

    def send_image(self, key: str, step: int, at: int, file: Path) -> None:
        self._write("image", key=key, step=step, file=file.name)

    def send_artifact(self, file: Path, folder: str | None) -> None:
        self._write("artifact", folder=folder, file=file.name)

    def register_model(self, snapshot: Path, name: str) -> None:
        self._write("model", name=name, folder=snapshot.name)

    def _write(self, call: str, **fields: Any) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, json.dumps({"call": call, **fields}).encode() + b"\n")
        os.close(file)


class HangingSink(JsonLinesSink):
    """A tracker that never answers."""

    def attach(self, opening: Record, run_id: str | None) -> tuple[str, bool]:
        time.sleep(3600)
        return super().attach(opening, run_id)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What has been sent so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main(sinks={**SINKS, "jsonl": JsonLinesSink, "hanging": HangingSink}))
