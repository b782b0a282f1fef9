"""Networks compiled for a GPU: norms, activations and filters become a few fused kernels around the convolutions.

R1 and R2 bypass the compiled networks, because compiled code has no second derivative. Runs with `run.deterministic`
do not compile: the compiler times variants of a kernel and takes the fastest, which can differ between processes.
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
    """The compiled forward pass of a network; falls back to the network itself if compilation fails."""

    def __init__(self, module: nn.Module, *, backend: Any = "inductor") -> None:
        self._module = module
        # Fixed shapes: a run has at most two micro-batch sizes, the usual one and a remainder.
        self._compiled = torch.compile(module, dynamic=False, backend=backend)
        self.failed = False

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The network's output. Images are converted to channels_last, the layout fastest for the kernels."""
        if self.failed:
            return self._module(*inputs)
        laid_out = (
            x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x
            for x in inputs
        )
        try:
            # Compile the backward pass now, together with the forward pass: when it runs, it is too late to fall back.
            with functorch.patch(force_non_lazy_backward_lowering=True):
                return self._compiled(*laid_out)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException  # takes a second to import, so only on failure

            if not isinstance(error, TorchDynamoException):
                raise
            reason = str(error).strip().partition("\n")[0]
            log.warning("torch.compile failed (%s); the network runs uncompiled, which is slower", reason)
            self.failed = True
            return self._module(*inputs)


def compiled_forward(
    module: nn.Module, engine: EngineConfig, *, deterministic: bool, zero_stage: int
) -> CompiledForward | None:
    """The compiled forward pass of a network, or None if the config or the machine rules it out.

    Args:
        module: the network, on its device.
        engine: says whether to compile.
        deterministic: run.deterministic.
        zero_stage: ZeRO stage of this network.
    """
    if not engine.compile or deterministic or not can_compile(module):
        return None
    # Not at stage 3, where parameters are gathered and freed layer by layer, nor with dropout masks from the caller.
    if zero_stage == 3 or any(isinstance(layer, Dropout) for layer in module.modules()):
        return None
    return CompiledForward(module)


def can_compile(module: nn.Module) -> bool:
    """Whether the network is on a GPU and torch.compile has a compiler for it."""
    return next(module.parameters()).is_cuda and find_spec("triton") is not None
