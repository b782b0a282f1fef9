"""A snapshot as a model of MLflow's flavour pyfunc: `mlflow.pyfunc.load_model(...).predict(...)` draws images.

MLflow loads it by the name of this module from the copy of the code that is kept with the model, and the weights from
safetensors: no pickle is read. Nothing here needs MLflow.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.storage.errors import UserError
from trainer.sample.draw import Loaded, load_run, sample_batches

SEED, CLASS = "seed", "class"
"""Columns of the input: whole numbers of 0 or more. The second is for models with classes, and may be left out."""


class Drawer:
    """The model.

    Args:
        loaded: generator, tables and config of a snapshot.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._generator, self._diffusion, self._config = loaded

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> NDArray[np.uint8]:
        """The first image of each seed, as `trainer.sample --seeds` draws it.

        Args:
            model_input: a data frame, or a mapping of columns, with `seed`, and `class` for a model with classes.
                Without `class`, the classes are drawn in turn.
            params: none are known.

        Returns:
            The images [N, H, W, C].

        Raises:
            UserError: the seeds or classes are wrong.
        """
        seeds = _whole_numbers(model_input, SEED)
        if seeds is None or not all(0 <= seed < 2**63 for seed in seeds):
            raise UserError(f"the column {SEED} must hold whole numbers from 0 to 2**63 - 1, one for each image")
        drawn = sample_batches(
            self._generator,
            self._diffusion,
            self._config,
            num=len(seeds),
            seed=0,
            seeds=seeds,
            classes=_whole_numbers(model_input, CLASS),
        )
        with torch.inference_mode():
            images = torch.cat(list(drawn))
        return images.permute(0, 2, 3, 1).numpy()


def _whole_numbers(model_input: Any, column: str) -> Sequence[int] | None:
    if column not in model_input:
        return None
    values = np.asarray(model_input[column])
    if values.ndim != 1 or not len(values) or not np.equal(np.mod(values, 1), 0).all():
        raise UserError(f"the column {column} must hold whole numbers, one for each image")
    return [int(value) for value in values]


def _load_pyfunc(path: str) -> Drawer:
    """Called by MLflow, with the folder of the snapshot."""
    return Drawer(load_run(Path(path), None))
