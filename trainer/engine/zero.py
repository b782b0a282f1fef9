"""The DeepSpeed engine, and the choice between it and the plain torch engine."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.engine.frozen import learning
from trainer.engine.guard import UpdateGuard
from trainer.engine.interface import Engine, EngineConfig, Fragment, FragmentSource
from trainer.engine.plain import (
    ADAM_STATES,
    TorchEngine,
    adam_states,
    count_updates,
    load_replicated,
    replicated_fragments,
    set_rates,
)
from trainer.engine.reduction import Reducer


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
        # Stage 3 empties the module's parameters, but loading and the average need their shapes.
        self._shapes = {name: p.shape for name, p in module.named_parameters()}
        # No overlap_comm: with it DeepSpeed waits for the device in each backward pass, and one comparison at stage 1
        # on two ranks was not bitwise equal.
        zero: dict[str, Any] = {"stage": zero_stage, "overlap_comm": False}
        # One bucket as large as the network; the default takes 2 GB of memory per engine.
        zero["reduce_bucket_size"] = sum(shape.numel() for shape in self._shapes.values())
        if zero_stage in (1, 2):
            zero["compute_grad_norm"] = False  # it would read a scalar off the device in every step
        config = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed uses it only for counting; the step weights the losses
            "gradient_accumulation_steps": grad_accum_steps,
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31 - 1,
        }
        with _linear_confined_to(module):
            self._engine, self._optimizer, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
        self.module = self._engine.module
        self._inner = optimizer if zero_stage == 0 else self._optimizer.optimizer
        # At stage 0 DeepSpeed would reduce all gradients after the backward pass.
        self._reducer = Reducer(learning(self.module) if zero_stage == 0 else (), multiplies=True)
        self._engine.enable_backward_allreduce = zero_stage > 0
        self._set_update_count(0)
        self.guard = UpdateGuard(max_gradient_norm, partitioned=zero_stage > 0, like=next(self.module.parameters()))

    def backward(self, loss: Tensor) -> None:
        self.guard.see(loss)
        if self._stage > 0:
            # The engine's own forward does this. Without it, stage 3 keeps only the last micro-batch's gradient.
            self._optimizer.clear_backward_seen_flag()
        elif self._engine.is_gradient_accumulation_boundary():
            self._reducer.expect()
        # The step has already weighted the loss by the micro-batch's share of the batch.
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, *, wait: bool = True) -> None:
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        self._reducer.launch_rest()
        if wait or not self._reducer.pending:
            self.finish()

    def finish(self) -> None:
        if not self._reducer.finish():
            return
        self.guard.judge(self._reduced_gradients())
        if self._stage in (1, 2):
            self._allocate_optimizer_state()  # DeepSpeed reads it after its first step, even if that was skipped
        with self.guard.over(self._inner):
            self._engine.step()
        if self._stage == 3 and self._optimizer.overflow:
            # Stage 3 has its own overflow check, on the float64 norm, and syncs with the host anyway: use its verdict.
            self.guard.skipped.fill_(1.0)

    def _reduced_gradients(self) -> list[Tensor]:
        """Averaged gradients this rank holds after the last micro-batch: all at stage 0, else only its partition's."""
        if self._stage == 0:
            return [p.grad for p in self.module.parameters() if p.grad is not None]
        return [g for group in self._optimizer.averaged_gradients.values() for g in group]

    def num_updates(self) -> int:
        return count_updates(self._inner)

    def set_rates(self, learning_rate: float, beta2: float | None = None) -> None:
        set_rates(self._inner, learning_rate, beta2)

    def numbers(self) -> object:
        return None  # its updates are not recorded

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
            yield from replicated_fragments(self.module.named_parameters(), self._inner)
            return
        self._allocate_optimizer_state()
        if self._stage < 3:
            for name, p in self.module.named_parameters():
                if not p.requires_grad:  # it is in no partition
                    yield from replicated_fragments([(name, p)], self._inner)
                    continue
                mapping = p._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
                if mapping is not None:
                    states = {s: mapping.get_hp_fragment(s) for s in ADAM_STATES}
                    parameter = mapping.get_hp_fragment().detach()
                    yield Fragment(name, mapping.lp_fragment_address.start, {"parameter": parameter, **states})
        else:
            for name, p, start, size in self._partitions():
                if size > 0:
                    tensors = {"parameter": p.ds_tensor.detach()}
                    if p.requires_grad:
                        tensors = {"parameter": self._optimizer.get_local_fp32_param(p).detach()}
                        tensors |= {s: self._optimizer.get_local_fp32_param(p, s) for s in ADAM_STATES}
                    yield Fragment(name, start, {key: value[:size] for key, value in tensors.items()})

    def load(self, source: FragmentSource, num_updates: int) -> None:
        if self._stage == 0:
            load_replicated(self.module, self._inner, source, num_updates)
            return
        if self._stage == 3 and (gathered := self._optimizer.persistent_parameters):
            gathered[0].partition(gathered)  # small parameters stay gathered between steps; later steps gather again
        with torch.no_grad():
            for fragment in self.fragments():
                for state, tensor in fragment.tensors.items():
                    stop = fragment.start + tensor.numel()
                    tensor.copy_(source.read(state, fragment.name, fragment.start, stop))
            # The forward pass uses a separate copy from the one that the optimizer updates.
            for name, start, tensor in self.live_parameters():
                tensor.view(-1).copy_(source.read("parameter", name, start, start + tensor.numel()))
        self._set_update_count(num_updates)

    def _allocate_optimizer_state(self) -> None:
        """Create Adam's state for this rank's partitions, which torch would only create at the first update."""
        zero = self._optimizer
        for partition in (
            zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        ):
            adam_states(self._inner, partition)
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _set_update_count(self, num_updates: int) -> None:
        """Set Adam's update count."""
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
    """The engine that the config names.

    Args:
        module: the network, on its device, with the same weights on every rank.
        optimizer: optimizer over all parameters of `module` that learn.
        config: names the backend.
        zero_stage: ZeRO stage of this network; 0 with the torch backend.
        grad_accum_steps: number of `backward` and `step` calls per update.
        max_gradient_norm: L2 norm of the averaged gradient above which an update is skipped; None: no limit.
    """
    if config.backend == "torch":
        return TorchEngine(module, optimizer, grad_accum_steps, max_gradient_norm)
    return DeepSpeedEngine(module, optimizer, grad_accum_steps, max_gradient_norm, zero_stage)


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, set up for `device` and for torch's process group, if there is one.

    On a CPU, without the operator that it would compile at first use.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed derives its device from LOCAL_RANK. A rank that sees only its own GPU needs 0, whatever its local rank.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    with _without("mlflow"):  # the autotuner imports it, which is four fifths of DeepSpeed's import time
        import deepspeed
        import deepspeed.ops

    compatible: dict[str, bool] = deepspeed.ops.__compatible_ops__
    compatible["deepspeed_shm_comm"] = False  # gloo does the same; building it takes 35 s and needs a compiler
    deepspeed.logger.setLevel("ERROR")
    # DeepSpeed calls deprecated names of torch's collectives once per step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if dist.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed


def import_optimizers() -> None:
    """Import what DeepSpeed imports with the first engine at ZeRO 1 or more, a second of computing; after itself."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def forget_group() -> None:
    """Drop DeepSpeed's reference to the process group, if DeepSpeed is imported."""
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._WORLD_GROUP = None  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _linear_confined_to(module: nn.Module) -> Iterator[None]:
    """Keep a linear layer that DeepSpeed may install inside from networks other than `module`.

    At stage 3 it replaces torch's for the whole process, by one that keeps no gathered weight for the backward pass.
    The order of its float sums differs: the average, or the networks of a later stage of the run, would compute other
    bits than in a process without this engine.
    """
    plain = F.linear
    try:
        yield
        installed = F.linear
    finally:
        F.linear = plain
    if installed is not plain:
        module.register_forward_pre_hook(lambda *_: setattr(F, "linear", installed))
        module.register_forward_hook(lambda *_: setattr(F, "linear", plain), always_call=True)


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Inside, importing `package` fails as if it were not installed, unless it is already imported."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        del sys.modules[package]
