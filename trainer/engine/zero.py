"""The DeepSpeed engine, and the choice between it and its plain torch twin."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engine.guard import UpdateGuard
from trainer.engine.interface import Engine, EngineConfig, Fragment, FragmentSource
from trainer.engine.plain import (
    ADAM_STATES,
    TorchEngine,
    adam_states,
    count_updates,
    load_replicated,
    replicated_fragments,
)


class DeepSpeedEngine:
    """A DeepSpeed engine at ZeRO stage 0 to 3, with fp32 parameters and a torch optimizer given by the caller."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        grad_accum_steps: int,
        max_gradient_norm: float | None,
        zero_stage: int,
    ) -> None:
        deepspeed = import_deepspeed(next(module.parameters()).device)
        self._stage, self.partitioned = zero_stage, zero_stage == 3
        # Stage 3 empties the parameters of the module; their shapes are needed for loading and for the average.
        self._shapes = {name: p.shape for name, p in module.named_parameters()}
        zero: dict[str, Any] = {"stage": zero_stage, "overlap_comm": False}
        # One bucket as large as the network; left out, it is 2 GB of memory for each engine.
        zero["reduce_bucket_size"] = sum(shape.numel() for shape in self._shapes.values())
        if zero_stage in (1, 2):
            zero["compute_grad_norm"] = False  # it would read a scalar off the device in every step
        config = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts with it; the losses are weighted by the step
            "gradient_accumulation_steps": grad_accum_steps,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31 - 1,
        }
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.module = self._engine.module
        self._inner = optimizer if zero_stage == 0 else self._optimizer.optimizer
        self._set_update_count(0)
        self.guard = UpdateGuard(max_gradient_norm, partitioned=zero_stage > 0)

    def backward(self, loss: Tensor) -> None:
        self.guard.see(loss)
        if self._stage > 0:
            # The engine's own forward does this. Without it stage 3 keeps the gradient of the last micro-batch alone.
            self._optimizer.clear_backward_seen_flag()
        # The step has already weighted the loss by the micro-batch's share of the batch.
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        self.guard.judge(self._reduced_gradients())
        if self._stage in (1, 2):
            self._allocate_optimizer_state()  # after its first step DeepSpeed asks for it, made or skipped
        with self.guard.over(self._inner):
            self._engine.step()
        if self._stage == 3 and self._optimizer.overflow:
            # Here DeepSpeed has a judge of its own, over the norm in float64; it does the same, and reads it each step.
            self.guard.skipped.fill_(1.0)

    def _reduced_gradients(self) -> list[Tensor]:
        """Averaged gradients this rank holds at a boundary: all of them at stage 0, else those of its partition."""
        if self._stage == 0:
            return [p.grad for p in self.module.parameters() if p.grad is not None]
        return [g for group in self._optimizer.averaged_gradients.values() for g in group]

    def num_updates(self) -> int:
        return count_updates(self._inner)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._inner.param_groups:
            group["lr"] = learning_rate

    def live_parameters(self) -> list[tuple[str, int, Tensor]]:
        if self._stage < 3:
            return [(name, 0, p.detach()) for name, p in self.module.named_parameters()]
        return [(name, start, p.ds_tensor.detach()[:size]) for name, p, start, size in self._partitions()]

    def _partitions(self) -> Iterator[tuple[str, Any, int, int]]:
        """Stage 3: name, parameter, offset and true length (without padding) of this rank's partitions."""
        for name, p in self.module.named_parameters():
            length = p.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
            start = min(dist.get_rank() * length, self._shapes[name].numel())
            yield name, p, start, min(length, self._shapes[name].numel() - start)

    def shapes(self) -> dict[str, torch.Size]:
        return self._shapes

    def fragments(self) -> Iterator[Fragment]:
        if self._stage == 0:
            yield from replicated_fragments(self.module, self._inner)
            return
        self._allocate_optimizer_state()
        if self._stage < 3:
            for name, p in self.module.named_parameters():
                mapping = p._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
                if mapping is not None:
                    states = {s: mapping.get_hp_fragment(s) for s in ADAM_STATES}
                    parameter = mapping.get_hp_fragment().detach()
                    yield Fragment(name, mapping.lp_fragment_address.start, {"parameter": parameter, **states})
        else:
            for name, p, start, size in self._partitions():
                if size > 0:
                    tensors = {"parameter": self._optimizer.get_local_fp32_param(p).detach()}
                    tensors |= {s: self._optimizer.get_local_fp32_param(p, s) for s in ADAM_STATES}
                    yield Fragment(name, start, {key: value[:size] for key, value in tensors.items()})

    def load(self, source: FragmentSource, num_updates: int) -> None:
        if self._stage == 0:
            load_replicated(self.module, self._inner, source, num_updates)
            return
        if self._stage == 3 and (gathered := self._optimizer.persistent_parameters):
            gathered[0].partition(gathered)  # small ones stay whole between steps; they are gathered anew when needed
        with torch.no_grad():
            for fragment in self.fragments():
                for state, tensor in fragment.tensors.items():
                    stop = fragment.start + tensor.numel()
                    tensor.copy_(source.read(state, fragment.name, fragment.start, stop))
            # The copy that the forward pass uses, beside the one that the optimizer updates.
            for name, start, tensor in self.live_parameters():
                tensor.view(-1).copy_(source.read("parameter", name, start, start + tensor.numel()))
        self._set_update_count(num_updates)

    def _allocate_optimizer_state(self) -> None:
        """Adam's state of this rank's partitions, which torch makes at the first update only."""
        zero = self._optimizer
        for partition in (
            zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        ):
            adam_states(self._inner, partition)
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _set_update_count(self, num_updates: int) -> None:
        """Set Adam's count of updates."""
        for state in self._inner.state.values():
            if "step" in state:
                state["step"].fill_(num_updates)

    def close(self) -> None:
        self._engine.destroy()


def make_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: EngineConfig,
    *,
    zero_stage: int,
    grad_accum_steps: int,
    max_gradient_norm: float | None = None,
) -> Engine:
    """The engine named by the config.

    Args:
        module: on its device, with the same weights on every rank.
        optimizer: over all parameters of `module`.
        config: names the backend.
        zero_stage: of this network, 0 with the torch backend.
        grad_accum_steps: number of `backward` and `step` calls of one update.
        max_gradient_norm: L2 norm of the averaged gradient above which an update is skipped; None: any finite one.
    """
    if config.backend == "torch":
        return TorchEngine(module, optimizer, grad_accum_steps, max_gradient_norm)
    return DeepSpeedEngine(module, optimizer, grad_accum_steps, max_gradient_norm, zero_stage)


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, set up for `device` and without the operator that it would compile on a CPU at first use."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed takes its device from it, which need not be the rank's number on its host: it may see its GPU alone.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    with _without("mlflow"):  # its autotuner would import it, which takes four fifths of the time that DeepSpeed takes
        import deepspeed
        import deepspeed.ops

    compatible: dict[str, bool] = deepspeed.ops.__compatible_ops__
    compatible["deepspeed_shm_comm"] = False  # gloo does its work; the build takes 35 s and needs a compiler
    deepspeed.logger.setLevel("ERROR")
    # DeepSpeed still calls the older names of torch's collectives, once per step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed


def forget_group() -> None:
    """Let go of the process group that DeepSpeed keeps, if it has been imported; it must not outlive the group."""
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._WORLD_GROUP = None  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Inside, an import of `package` fails as if it were not installed, unless it has been imported before."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[package]
