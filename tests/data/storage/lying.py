"""Storage that lies: every call of the operating system below one folder is counted, and one of them goes wrong."""

import builtins
import io
import os
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
    covered.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, fault: Any = None, at: int = -1) -> None:
        self.folder, self.fault, self.at, self.calls, self.happened = str(folder), fault, at, 0, False
        self._names: dict[int, str] = {}
        self._unsynced: set[str] = set()
        self._write = os.write
        for name in CALLS:
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        for module in (builtins, io):
            patch.setattr(module, "open", self._wrapped("open", builtins.open if module is builtins else io.open))

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            target: Any = arguments[0] if arguments else "."
            file = self._names.get(target, "") if isinstance(target, int) else os.fspath(target)
            if not isinstance(file, str) or not file.startswith(self.folder):
                return real(*arguments, **more)
            number, self.calls = self.calls, self.calls + 1
            if number == self.at or (isinstance(self.fault, tuple) and number > self.at >= 0):
                self.happened = True
                if self.fault == "cut":
                    self._cut()
                if name == "write" and self.fault in ("short", "torn"):
                    half = self._write(target, arguments[1][: max(1, len(arguments[1]) // 2)])
                    return half if self.fault == "short" else len(arguments[1])
                if self.fault not in ("short", "torn"):
                    code: Any = self.fault[1] if isinstance(self.fault, tuple) else self.fault
                    raise OSError(code, os.strerror(code), file)
            result = real(*arguments, **more)
            self._follow(name, target, file, arguments, result)
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
        elif name in ("replace", "rename") and file in self._unsynced:
            self._unsynced.discard(file)
            self._unsynced.add(os.fspath(arguments[1]))

    def _cut(self) -> None:
        for file in self._unsynced:
            if Path(file).is_file():
                os.truncate(file, Path(file).stat().st_size // 2)
        raise PowerCut
