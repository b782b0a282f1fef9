"""Players on small networks whose engines add gradients up and never step."""

import torch
from torch import Tensor, nn

from models.diffusion import Diffusion, DiffusionConfig
from tests.trainer.engine.conformance_rank import networks
from trainer.algorithm.method import Players
from trainer.engine.interface import Engine


class Accumulator(Engine):
    """An engine that only adds gradients up."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, *, wait: bool = True) -> None: ...


def make_players(bf16: bool = False) -> Players:
    generator, discriminator = (Accumulator(network) for network in networks())  # pyright: ignore[reportAbstractUsage]
    diffusion = Diffusion.from_config(DiffusionConfig(), torch.device("cpu"))
    return Players({"g": generator, "d": discriminator}, diffusion, bf16=bf16)
