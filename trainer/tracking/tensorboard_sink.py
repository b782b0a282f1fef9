"""TensorBoard: one event file for each run, in the run directory. The only file that uses tensorboardX.

An event file is a sequence of records: the length of the message (8 bytes), its masked CRC-32C, the message, its masked
CRC-32C. tensorboardX has the messages and the checksum, but only writers that cannot continue a file.
"""

import importlib.util
import itertools
import re
import struct
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.storage.files import sync_file
from trainer.tracking.sink import Point, RefusedError, RunGoneError
from trainer.tracking.spool import Record

VERSION = "brain.Event:2"  # the first message of a file
_COLORSPACES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}


class TensorBoardSink:
    """A folder of event files; each run has a subfolder, named by the start of its own id.

    TensorBoard has no status of a run and stores no files. Settings, tags and the places of files are shown as texts.
    """

    is_buffered = False

    def __init__(self, uri: str, run_directory: Path):
        """Store the place; the first `attach` opens the event file.

        Args:
            uri: the folder.
            run_directory: folder of the run; the places of files are shown as seen from it.
        """
        self._folder = Path(uri)
        self._run_directory = run_directory
        self._file = Path()
        self._steps: dict[str, set[int]] = {}
        self._texts: set[tuple[str, int, str]] = set()

    def limit_requests(self, timeout_s: float) -> None: ...

    def attach(self, opening: Record, run_id: str | None) -> tuple[str, bool]:
        """Open the event file of the run, or make it. What a killed process left of a record is cut off.

        Raises:
            RunGoneError: the file that an earlier call had opened is gone, or was cut.
        """
        name = re.sub(r"\W", "", opening.payload["uid"])[:8]
        self._file = self._folder / name / f"events.out.tfevents.{name}"
        created = not self._file.exists()
        if created:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch()
        whole = self._read()
        cut = whole < self._file.stat().st_size
        if cut:
            with self._file.open("r+b") as file:
                file.truncate(whole)
        if not whole:
            self._write([{"wall_time": opening.at / 1000, "file_version": VERSION}])
        if run_id == name and (created or cut):
            raise RunGoneError(f"{self._file} was {'removed' if created else 'damaged, and is cut'}")
        return name, created

    def describe(self, opening: Record) -> None:
        """Write params and tags as tables."""
        for tag, values in (("params", opening.payload.get("params", {})), ("tags", opening.payload.get("tags", {}))):
            self._write_text(tag, opening.step or 0, opening.at, _table(values))

    def set_status(self, status: str, at: int | None) -> None: ...

    def known_steps(self, key: str) -> set[int]:
        return set(self._steps.get(key, ()))

    def send_points(self, points: Sequence[Point]) -> None:
        groups = itertools.groupby(points, key=lambda point: (point.step, point.at))
        self._write(
            _event(step, at, [{"tag": point.key, "simple_value": point.value} for point in group])
            for (step, at), group in groups
        )

    def send_image(self, key: str, step: int, at: int, file: Path) -> None:
        from PIL import Image

        if step in self._steps.get(key, ()):
            return
        try:
            with Image.open(file) as image:
                image.verify()
                size, color = image.size, _COLORSPACES.get(image.mode, 3)
        except (OSError, ValueError, SyntaxError) as error:  # pillow raises the last for a broken PNG
            raise RefusedError(f"{file} is no image: {error}") from error
        shown = {"width": size[0], "height": size[1], "colorspace": color, "encoded_image_string": file.read_bytes()}
        self._write([_event(step, at, [{"tag": key, "image": shown}])])

    def send_artifact(self, file: Path, folder: str | None) -> None:
        """Write where the file is: TensorBoard keeps none."""
        at = int(file.stat().st_mtime * 1000)
        with suppress(ValueError):  # outside the run directory: shown with its whole path
            file = file.relative_to(self._run_directory)
        self._write_text("/".join(filter(None, ("files", folder, file.name))), 0, at, f"`{file}`")

    def register_model(self, snapshot: Path, name: str) -> None:
        """Nothing: TensorBoard has no models."""

    def _write_text(self, tag: str, step: int, at: int, text: str) -> None:
        if (tag, step, text) in self._texts:
            return
        tensor = {"dtype": "DT_STRING", "string_val": [text.encode()], "tensor_shape": {"dim": [{"size": 1}]}}
        value = {"tag": tag, "metadata": {"plugin_data": {"plugin_name": "text"}}, "tensor": tensor}
        self._write([_event(step, at, [value])])

    def _read(self) -> int:
        """Note what the event file holds; returns where its last whole record ends."""
        self._steps, self._texts, whole = {}, set(), 0
        for event, end in read_events(self._file):
            self._note(event)
            whole = end
        return whole

    def _note(self, event: Any) -> None:
        for value in event.summary.value:
            if value.HasField("tensor"):
                self._texts.add((value.tag, event.step, value.tensor.string_val[0].decode()))
            else:
                self._steps.setdefault(value.tag, set()).add(event.step)

    def _write(self, events: Iterable[Mapping[str, Any]]) -> None:
        if not self._file.exists():
            raise RunGoneError(f"{self._file} was removed")
        make = _event_class()
        messages = [make(**event) for event in events]
        with self._file.open("ab") as file:
            file.write(b"".join(_framed(message.SerializeToString()) for message in messages))
        with suppress(OSError):  # some file systems cannot sync
            sync_file(self._file)
        for message in messages:
            self._note(message)


def read_events(file: Path) -> Iterator[tuple[Any, int]]:
    """The whole records of an event file, each with the offset of its end."""
    parse = _event_class().FromString
    with file.open("rb") as stream:
        size = file.stat().st_size
        while len(header := stream.read(12)) == 12:
            (length,), checksum = struct.unpack("<Q", header[:8]), header[8:]
            if checksum != _checksum(header[:8]) or stream.tell() + length + 4 > size:
                return
            message = stream.read(length + 4)[:-4]
            try:
                event = parse(message)
            except Exception:  # protobuf's DecodeError: the record is damaged
                return
            yield event, stream.tell()


def _event_class() -> Any:
    """The class of events. It comes without tensorboardX itself, which would import torch: 2 s and 200 MiB."""
    if "tensorboardX" not in sys.modules:
        found = importlib.util.find_spec("tensorboardX")
        assert found
        sys.modules["tensorboardX"] = package = types.ModuleType("tensorboardX")
        package.__path__ = found.submodule_search_locations or []
    from tensorboardX.proto import event_pb2

    messages: Any = event_pb2  # protobuf makes its classes when it is imported
    return messages.Event


def _event(step: int, at: int, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"wall_time": at / 1000, "step": step, "summary": {"value": values}}


def _framed(message: bytes) -> bytes:
    length = struct.pack("<Q", len(message))
    return length + _checksum(length) + message + _checksum(message)


def _checksum(data: bytes) -> bytes:
    """The CRC-32C of TensorFlow's records: rotated, with a constant added."""
    from tensorboardX.crc32c import crc32c

    crc = crc32c(data) & 0xFFFFFFFF
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _table(values: Mapping[str, str]) -> str:
    """A Markdown table of names and values."""
    shown = {name: " ".join(value.replace("|", "\\|").splitlines()) for name, value in values.items()}
    rows = (f"| {name} | {value} |" for name, value in shown.items())
    return "\n".join(["| name | value |", "|---|---|", *rows])
