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
from torch._functorch import config as functorch

from models.dropout import Dropout
from trainer.engine.interface import EngineConfig

log = logging.getLogger(__name__)


class CompiledForward:
    """The forward pass of a network, compiled; the network's own where the compiler fails."""

    def __init__(self, module: nn.Module, *, backend: Any = "inductor") -> None:
        self._module = module
        # Of fixed shapes: a run has one size of micro-batch, at most another for the rest.
        self._compiled = torch.compile(module, dynamic=False, backend=backend)
        self.failed = False

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The network's output; images are laid out as the kernels like them."""
        if self.failed:
            return self._module(*inputs)
        laid_out = (
            x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x
            for x in inputs
        )
        try:
            # The backward pass is compiled with the forward one: where it is called, nothing could take its place.
            with functorch.patch(force_non_lazy_backward_lowering=True):
                return self._compiled(*laid_out)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException  # a second to import, which other starts are spared

            if not isinstance(error, TorchDynamoException):
                raise
            reason = str(error).strip().partition("\n")[0]
            log.warning("a network is not compiled, its steps are slower: torch.compile fails (%s)", reason)
            self.failed = True
            return self._module(*inputs)


def compiled_forward(
    module: nn.Module, engine: EngineConfig, *, deterministic: bool, zero_stage: int
) -> CompiledForward | None:
    """The compiled pass of a network that is trained, or None where the config or the machine rules it out.

    Args:
        module: on its device.
        engine: says whether to compile.
        deterministic: run.deterministic.
        zero_stage: of this network.
    """
    if not engine.compile or deterministic or not can_compile(module):
        return None
    # At stage 3 the parameters come and go between layers, and masks of dropout come from outside.
    if zero_stage == 3 or any(isinstance(layer, Dropout) for layer in module.modules()):
        return None
    return CompiledForward(module)


def can_compile(module: nn.Module) -> bool:
    """Whether the network is on a GPU that torch.compile has a compiler for."""
    return next(module.parameters()).is_cuda and find_spec("triton") is not None
