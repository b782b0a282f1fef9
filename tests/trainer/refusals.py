"""Configs made in code, and what is said against them."""

import pytest

from trainer.config.io import from_dict
from trainer.config.train_config import TrainConfig


def make(**sections: dict) -> TrainConfig:
    values: dict = {
        "run": {"directory": "r"},
        "data": {"path": "d", "image_size": 32},
        "training": {"total_images": 1000, "global_batch_size": 64},
    }
    for name, fields in sections.items():
        values[name] = values.get(name, {}) | fields
    return from_dict(values)


def refusals(**sections: dict) -> list[str]:
    with pytest.raises(ValueError) as caught:
        make(**sections)
    return [line.removeprefix("config: ") for line in str(caught.value).splitlines()]
