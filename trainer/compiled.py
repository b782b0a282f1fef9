"""Networks compiled for a GPU: their norms, activations and filters become a few fused kernels around the convolutions.

What is differentiated twice, R1 and R2, goes past them: compiled code has a first derivative only. So does a run with
`run.deterministic`, because the compiler times variants of a kernel and takes the fastest, which may be another one in
the next process.
"""

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from trainer.config import TrainConfig

log = logging.getLogger(__name__)


class CompiledForward:
    """The forward pass of a network, compiled; the network's own where the compiler fails."""

    def __init__(self, module: nn.Module, *, channels_last: bool = True, backend: Any = "inductor") -> None:
        self._module = module
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        # Of fixed shapes: a run has one size of micro-batch, at most another for the rest.
        self._compiled = torch.compile(module, dynamic=False, backend=backend)
        self.failed = False

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The network's output; images are laid out as the kernels like them."""
        if self.failed:
            return self._module(*inputs)
        laid_out = (
            x.contiguous(memory_format=self._format) if isinstance(x, Tensor) and x.dim() == 4 else x for x in inputs
        )
        try:
            return self._compiled(*laid_out)
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            log.warning("a network is not compiled, its steps are slower: torch.compile fails (%s)", reason)
            self.failed = True
            return self._module(*inputs)


def compiled_forward(module: nn.Module, config: TrainConfig, *, zero_stage: int) -> CompiledForward | None:
    """The compiled pass of a network, or None where the config or the machine rules it out.

    Args:
        module: on its device.
        config: says whether to compile.
        zero_stage: of this network.
    """
    device = next(module.parameters()).device
    if not config.engine.compile or config.run.deterministic or device.type != "cuda" or find_spec("triton") is None:
        return None
    # At stage 3 the parameters come and go between layers, and masks of dropout come from outside.
    if zero_stage == 3 or any(getattr(layer, "probability", 0) for layer in module.modules()):
        return None
    return CompiledForward(module, channels_last=config.engine.channels_last)
