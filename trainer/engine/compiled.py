"""Networks compiled for a GPU: norms, activations and filters become a few fused kernels around the convolutions.

Training compiles by block, not by network: blocks with the same weights' shapes and inputs share one piece of code, so
a network takes as long to compile as its different blocks. What is between the blocks runs uncompiled.

R1 and R2 bypass the compiled code, because it has no second derivative: outside of a `CompiledForward` call, a network
and its blocks are as they were. Runs with `run.deterministic` do not compile: the compiler times variants of a kernel
and takes the fastest, which can differ between processes.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks import Attention, ResidualBlock
from models.discriminator import DecoderBlock, DownBlock
from models.dropout import Dropout
from models.layers import Block
from models.networks.resnext import ResNeXtBlock
from trainer.engine.compile_cache import CompileCache

log = logging.getLogger(__name__)

BLOCKS = (ResidualBlock, Attention, DownBlock, DecoderBlock, ResNeXtBlock)
_MAX_VARIANTS = 64
"""Graphs of one kind of block: each size of a micro-batch, with and without gradients, for each feature map size."""


class CompiledForward:
    """The compiled forward pass of a network; falls back to the network itself if compilation fails.

    Args:
        module: the network, on its device.
        blocks: its parts to compile; empty: the network as a whole, which takes longer and runs faster.
        cache: where the compiled code is kept; None: wherever torch keeps it.
        backend: backend of torch.compile.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[nn.Module] = (),
        *,
        cache: CompileCache | None = None,
        backend: Any = "inductor",
    ) -> None:
        self._module, self._cache = module, cache
        self._kinds: dict[str, Any] = {}
        self._forwards = [(block, MethodType(self._code(block, backend), block)) for block in blocks or [module]]
        self._seen: dict[str, str] = {}
        self.failed = False

    def _code(self, block: nn.Module, backend: Any) -> Any:
        """The compiled forward pass of all blocks of this kind, a function of the block and its inputs."""
        kind = repr(block)  # names the class, and the sizes of all layers in it
        if kind not in self._kinds:
            forward = type(block).forward
            # torch keeps its graphs by code object and tries them in turn. A copy gives each kind a short list.
            copied = FunctionType(
                forward.__code__.replace(),
                forward.__globals__,
                forward.__name__,
                forward.__defaults__,
                forward.__closure__,
            )
            # Fixed shapes: a run has at most three micro-batch sizes, the usual one, a remainder and a padding.
            self._kinds[kind] = torch.compile(copied, dynamic=False, backend=backend)
        return self._kinds[kind]

    def __call__(self, *inputs: Tensor | None, **options: bool) -> Any:
        """The network's output. Images are converted to channels_last, the layout fastest for the kernels."""
        if self.failed:
            return self._module(*inputs, **options)
        laid_out = [
            x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.dim() == 4 else x
            for x in inputs
        ]
        try:
            with self._turn(laid_out, options), self._with_compiled_blocks():
                return self._module(*laid_out, **options)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            reason = str(error).strip().partition("\n")[0]
            log.warning("torch.compile failed (%s); the network runs uncompiled, which is slower", reason)
            self.failed = True
            return self._module(*inputs, **options)

    @contextmanager
    def _with_compiled_blocks(self) -> Iterator[None]:
        """Inside, the network's blocks run their compiled code. It replaces `forward` alone, so hooks still run."""
        from torch._dynamo import config as dynamo  # takes a second to import, so not where nothing is compiled
        from torch._functorch import config as functorch

        for block, forward in self._forwards:
            block.forward = forward
        try:
            # Compile a backward pass together with its forward pass: when it runs, it is too late to fall back.
            with functorch.patch(force_non_lazy_backward_lowering=True), dynamo.patch(recompile_limit=_MAX_VARIANTS):
                yield
        finally:
            for block, _ in self._forwards:
                del block.forward

    @contextmanager
    def _turn(self, inputs: Sequence[Tensor | None], options: Mapping[str, bool]) -> Iterator[None]:
        """Inside, the network may compile; if it gets such inputs for the first time, the other ranks wait for it."""
        if self._cache is None:
            yield
            return
        shapes = [x if x is None else (*x.shape, x.dtype, x.requires_grad) for x in inputs]
        frozen = not any(p.requires_grad for p in self._module.parameters())
        amp = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        form = repr((shapes, *options, frozen, torch.is_grad_enabled(), amp))
        if name := self._seen.get(form):
            self._cache.report(name)
            yield
            return
        name = "\n".join((form, *(repr(block) for block, _ in self._forwards)))
        with self._cache.turn(name, 0 if self._seen else len(self._kinds)):
            yield
        self._seen[form] = name


def compiled_forward(module: nn.Module, cache: CompileCache, *, zero_stage: int) -> CompiledForward | None:
    """The forward pass of a network compiled by block, or None, with a line in the log, where that cannot be.

    Args:
        module: the network, on its device.
        cache: where the compiled code is kept.
        zero_stage: ZeRO stage of this network.
    """
    reason = None
    if not can_compile(module):
        reason = "it needs a GPU and triton"
    elif zero_stage == 3:
        reason = "at ZeRO stage 3 the parameters are gathered layer by layer, which interrupts each compiled block"
    elif any(isinstance(layer, Dropout) for layer in module.modules()):
        reason = "it has dropout, whose masks come from outside"
    elif any(isinstance(layer, Block) and layer.recomputes for layer in module.modules()):
        reason = "with engine.checkpoint_activations the backward pass computes its blocks again, uncompiled"
    if reason is not None:
        log.info("engine.compile has no effect on the %s: %s", type(module).__name__.lower(), reason)
        return None
    return CompiledForward(module, blocks_of(module), cache=cache)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks that are compiled one by one."""
    return [block for block in module.modules() if isinstance(block, BLOCKS)]


def can_compile(module: nn.Module) -> bool:
    """Whether the network is on a GPU and torch.compile has a compiler for it."""
    return next(module.parameters()).is_cuda and find_spec("triton") is not None
