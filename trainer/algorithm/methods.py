"""The training methods by the name in `training.objective`. To add a method, write its file and add a line here."""

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
    """The method that a config describes.

    Args:
        settings: the config's training section.
        generator: the config's generator section.

    Raises:
        ValueError: the settings contradict each other; the message says which ones, and what to set.
    """
    return METHODS[settings.objective](settings, generator)
