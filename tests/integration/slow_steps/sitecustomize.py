"""On the PYTHONPATH of a run, it makes each step wait: a run then lasts as long as with large networks, and computes
little. Whoever watches clusters needs runs that last, and the other tests need the processor.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _SlowLoop(MetaPathFinder):
    """Finds the module of the training loop once, and changes it after its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "trainer.rank.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_slow(module: ModuleType) -> None:
            execute(module)
            module.Loop._one_step = _slow(module.Loop._one_step)

        loader.exec_module = execute_and_slow
        return spec


def _slow(step: Callable[[Any], None]) -> Callable[[Any], None]:
    def slow(loop: Any) -> None:
        if not os.path.exists(os.environ.get("SLOW_STEPS_UNLESS", "")):
            time.sleep(float(os.environ["SLOW_STEPS_S"]))
        step(loop)

    return slow


if "SLOW_STEPS_S" in os.environ:
    sys.meta_path.insert(0, _SlowLoop())
