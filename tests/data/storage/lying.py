"""Storage that lies: every call of the operating system below one folder is counted, and one of them goes wrong."""

import builtins
import io
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "scandir", "stat")


class PowerCut(BaseException):
    """The machine is off; nothing in the program can catch it."""


class Lying:
    """Patches `os` and `open`. The calls on files below `folder` are numbered from 0; `fault` happens at `at`.

    Faults: an errno, raised once; ("from", errno), raised from then on; "short", a write that takes half of the bytes
    and says so; "torn", one that takes half and says that it took all; "cut", a power cut that halves what no fsync has
    covered; "undone", one that also undoes each change of a folder's names that no fsync of the folder has covered.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, fault: Any = None, at: int = -1) -> None:
        self.folder, self.fault, self.at, self.calls, self.happened = str(folder), fault, at, 0, False
        self._names: dict[int, str] = {}
        self._unsynced: set[str] = set()
        self._looks_itself = False  # its own calls are not the program's
        self._undo: list[tuple[str, Callable[[], object]]] = []
        """Changes of names in order: the folder, and what undoes the change."""
        self._write = os.write
        for name in CALLS:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        for module in (builtins, io):
            patch.setattr(module, "open", self._wrapped("open", builtins.open if module is builtins else io.open))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            target: Any = arguments[0] if arguments else "."
            file = self._names.get(target, "") if isinstance(target, int) else os.fspath(target)
            if self._looks_itself or not isinstance(file, str) or not file.startswith(self.folder):
                return real(*arguments, **more)
            number, self.calls = self.calls, self.calls + 1
            if number == self.at or (isinstance(self.fault, tuple) and number > self.at >= 0):
                self.happened = True
                if self.fault in ("cut", "undone"):
                    self.cut()
                if name == "write" and self.fault in ("short", "torn"):
                    half = self._write(target, arguments[1][: max(1, len(arguments[1]) // 2)])
                    return half if self.fault == "short" else len(arguments[1])
                if self.fault not in ("short", "torn"):
                    code: Any = self.fault[1] if isinstance(self.fault, tuple) else self.fault
                    raise OSError(code, os.strerror(code), file)
            undo = self._undoing(name, file, arguments) if self.fault == "undone" else None
            result = real(*arguments, **more)
            self._follow(name, target, file, arguments, result)
            if undo:
                self._undo.append((os.path.dirname(file), undo))
            return result

        return call

    def _follow(self, name: str, target: Any, file: str, arguments: Sequence[Any], result: Any) -> None:
        if name == "open" and isinstance(result, int):
            self._names[result] = file
            if len(arguments) > 1 and arguments[1] & (os.O_WRONLY | os.O_RDWR):
                self._unsynced.add(file)
        elif name == "open" and len(arguments) > 1 and arguments[1] != "rb" and "r" not in str(arguments[1]):
            self._unsynced.add(file)
        elif name == "fsync":
            self._unsynced.discard(file)
            self._undo = [(folder, undo) for folder, undo in self._undo if folder != file]
        elif name in ("replace", "rename") and file in self._unsynced:
            self._unsynced.discard(file)
            self._unsynced.add(os.fspath(arguments[1]))

    def _undoing(self, name: str, file: str, arguments: Sequence[Any]) -> Callable[[], object] | None:
        """What would undo a call that changes names; None if it changes none."""
        path = Path(file)
        self._looks_itself = True
        kept = path.read_bytes() if name == "unlink" and path.is_file() else b""
        target = Path(arguments[1]) if name in ("rename", "replace") else path
        former = target.read_bytes() if name in ("rename", "replace") and target.is_file() else None
        is_new = not path.exists()
        self._looks_itself = False

        def restore(place: Path, content: bytes) -> None:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)

        def move_back() -> None:
            if target.exists():
                target.rename(path)
            if former is not None:
                restore(target, former)

        match name:
            case "open" if is_new and len(arguments) > 1:
                return lambda: path.unlink(missing_ok=True)
            case "mkdir" if is_new:
                return lambda: shutil.rmtree(path, ignore_errors=True)
            case "unlink" if not is_new:
                return lambda: restore(path, kept)
            case "rename" | "replace":
                return move_back
            case _:
                return None

    def cut(self) -> None:
        """Cut the power now.

        Raises:
            PowerCut: always.
        """
        self._looks_itself = True
        for file in self._unsynced:
            if Path(file).is_file():
                os.truncate(file, Path(file).stat().st_size // 2)
        for _, undo in reversed(self._undo):
            undo()
        self._undo = []
        raise PowerCut
