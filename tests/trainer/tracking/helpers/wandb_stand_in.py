"""A stand-in for W&B's library and server, which fails on command.

A library (`Library`) is that of one process. It takes rows and sends them later, as W&B's does: what it has not sent is
lost with its process. It fails where a hook raises.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Config:
    values: dict[str, Any] = field(default_factory=dict)

    def update(self, values: dict[str, Any], *, allow_val_change: bool) -> None:
        assert allow_val_change
        self.values |= values


@dataclass
class Server:
    """What W&B holds of one run; None before it was made."""

    id: str | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    config: Config = field(default_factory=Config)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: set[tuple[str, str]] = field(default_factory=set)
    ends: list[tuple[int, bool]] = field(default_factory=list)
    """Exit code of each end, and whether it was preempted."""

    def points(self, key: str) -> list[int]:
        return [row["step"] for row in self.rows if key in row]


class Image:
    def __init__(self, path: str) -> None:
        if not Path(path).read_bytes().startswith(b"\x89PNG"):
            raise ValueError("cannot identify image file")


class Artifact:
    def __init__(self, name: str, type: str) -> None:
        self.name, self.type = name, type

    def add_file(self, path: str, *, policy: str, skip_cache: bool) -> None:
        assert policy == "immutable" and skip_cache

    def wait(self) -> None: ...


class Run:
    entity, project, offline = "entity", "project", False

    def __init__(self, library: "Library", id: str, resumed: bool) -> None:
        self.id, self.resumed, self.dir = id, resumed, "dir"
        self._library, self._server = library, library.server
        self.config, self.summary = library.server.config, library.server.summary
        self._pending: list[dict[str, Any]] = []
        self._preempting = False

    def define_metric(self, name: str, **options: Any) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        assert row.pop("_timestamp") > 1.7e9  # in s, where our records have ms

        def take() -> None:
            self._pending.append(row)
            if len(self._pending) == 3:  # the first two arrive, and the third may be lost
                self._server.rows += [self._pending.pop(0), self._pending.pop(0)]

        self._library.call("log", take)

    def log_artifact(self, artifact: Artifact) -> Artifact:
        self._library.call("artifact", lambda: self._server.artifacts.add((artifact.name, artifact.type)))
        return artifact

    def mark_preempting(self) -> None:
        self._preempting = True

    def finish(self, *, exit_code: int) -> None:
        def end() -> None:
            self._server.rows += self._pending
            self._pending = []
            self._server.ends.append((exit_code, self._preempting))
            self._library.in_use.remove(self.id)

        self._library.call("finish", end)


class Library:
    """Takes the place of the module `wandb`."""

    def __init__(self, server: Server, before: Callable[[str], None], after: Callable[[str], None]) -> None:
        self.server, self._before, self._after = server, before, after
        self.in_use: set[str] = set()
        self.Image, self.Artifact, self.Settings = Image, Artifact, dict

    def call(self, name: str, effect: Callable[[], object]) -> None:
        self._before(name)
        effect()
        self._after(name)

    def init(self, *, id: str, resume: str, **options: Any) -> Run:
        assert resume == "allow"
        if id in self.in_use:
            raise RuntimeError(f"run ID {id} is in use")
        self.in_use.add(id)
        resumed = self.server.id == id
        self.call("init", lambda: setattr(self.server, "id", id))
        return Run(self, id, resumed)

    def teardown(self, exit_code: int) -> None:
        self.in_use.clear()

    def Api(self, **options: Any) -> "Api":  # noqa: N802
        return Api(self)


@dataclass
class Api:
    library: Library

    def run(self, path: str) -> "Api":
        assert path == f"entity/project/{self.library.server.id}"
        return self

    def scan_history(self) -> Iterator[dict[str, Any]]:
        self.library.call("scan", lambda: None)
        yield from self.library.server.rows
