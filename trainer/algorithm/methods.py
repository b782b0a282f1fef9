"""The methods by the name in `training.objective`. A new method is a file of its own and a line here."""

from collections.abc import Callable
from typing import Any

from models.generator import GeneratorConfig
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.gaussian import Gaussian
from trainer.algorithm.losses import OBJECTIVES
from trainer.algorithm.method import Method, MethodSettings

METHODS: dict[str, Callable[[MethodSettings, GeneratorConfig], Method[Any]]] = {
    **dict.fromkeys(OBJECTIVES, Adversarial.of),
    "gaussian": Gaussian.of,
}


def make_method(settings: MethodSettings, generator: GeneratorConfig) -> Method[Any]:
    """The method that a config names.

    Args:
        settings: its training section.
        generator: its generator section.

    Raises:
        ValueError: the settings do not fit each other; the message says which, and what to set.
    """
    return METHODS[settings.objective](settings, generator)
