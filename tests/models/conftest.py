"""Run-time checks of shapes and types in `models`, and the golden files."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from torch import Tensor

# Modules that were imported before the hook stay unchecked, so it must come first.
if not any(type(finder).__module__.startswith("jaxtyping") for finder in sys.meta_path):
    install_import_hook(["models"], "beartype.beartype")

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden(NamedTuple):
    """One run of the published code."""

    settings: dict[str, Any]
    state: dict[str, Tensor]
    arrays: dict[str, Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same numbers alone and among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Reader of a golden file by name."""

    def read(name: str) -> Golden:
        with np.load(GOLDEN / f"{name}.npz") as file:
            contents = {key: file[key] for key in file.files}
        settings = json.loads(str(contents.pop("config")))
        tensors = {key: torch.from_numpy(np.asarray(array)) for key, array in contents.items()}
        state = {key.removeprefix("sd/"): tensor for key, tensor in tensors.items() if key.startswith("sd/")}
        arrays = {key: tensor for key, tensor in tensors.items() if not key.startswith("sd/")}
        return Golden(settings, state, arrays)

    return read


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], Any]:
    """Reader of a golden JSON file by name."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())
