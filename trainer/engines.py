"""What runs backward, gradient reduction and the optimizer: a DeepSpeed engine, and a plain torch twin of it.

Both show the same small face, so the step reads the same over either. How to use them, and why (each of these was
measured: the other ways are silently wrong at some ZeRO stage):

* every forward goes through `engine.module`, never through the engine;
* one summed loss and one `backward` per micro-batch, R1 inside that loss;
* while the generator learns, the discriminator's parameters do not require grad;
* gradient clipping is set to 0, because DeepSpeed clips at 1.0 when it is left out.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import AdamConfig, EngineConfig
from trainer.guard import UpdateGuard

ADAM_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """The contiguous piece of one flattened parameter that a rank owns, with its optimizer state.

    The fragments of all ranks tile every parameter exactly once at every ZeRO stage, so together they are the state of
    the engine, whatever the number of ranks that wrote them.

    Attributes:
        name: of the parameter in the module.
        start: offset of the piece in the flattened parameter.
        tensors: "parameter", "exp_avg" and "exp_avg_sq", each flat and of the piece's length.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]


class FragmentSource(Protocol):
    """Where saved state is read from, by ranges of flattened parameters."""

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of `state` ("parameter", "exp_avg", "exp_avg_sq") of parameter `name`, on the CPU."""
        ...


class Engine(Protocol):
    """A network with its optimizer."""

    module: nn.Module
    guard: UpdateGuard

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of `loss`; on the last micro-batch of the step it is averaged over the ranks."""
        ...

    def step(self) -> None:
        """Called after each `backward`; updates the parameters after the last micro-batch of the step.

        The update is skipped, on all ranks alike, if the guard says so.
        """
        ...

    def num_updates(self) -> int:
        """Updates that the optimizer has made, which skipped ones do not count among. Waits for the device."""
        ...

    def set_learning_rate(self, learning_rate: float) -> None:
        """Learning rate of the next update."""
        ...

    def live_parameters(self) -> list[tuple[str, int, Tensor]]:
        """Name, offset and memory of what this rank holds: whole parameters, or its own partitions at stage 3."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """The pieces this rank owns."""
        ...

    def load(self, source: FragmentSource, num_updates: int) -> None:
        """Take parameters and optimizer state from `source`; `num_updates` were made before."""
        ...

    def close(self) -> None:
        """Release what the engine registered with the process."""
        ...


def even_share(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """The [start, stop) that `rank` owns of `numel` elements that all ranks hold."""
    return numel * rank // world_size, numel * (rank + 1) // world_size


def make_adam(module: nn.Module, adam: AdamConfig, device: torch.device) -> torch.optim.Adam:
    """Adam over all parameters. Its learning rate is set before each update."""
    return torch.optim.Adam(
        module.parameters(), lr=0.0, betas=(adam.beta1, adam.beta2), eps=adam.eps, fused=device.type == "cuda"
    )


class TorchEngine:
    """The plain twin: torch's optimizer, gradients averaged over the ranks by one all-reduce, every rank holds all."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        grad_accum_steps: int,
        max_gradient_norm: float | None,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.guard = UpdateGuard(max_gradient_norm, partitioned=False)
        self._grad_accum_steps = grad_accum_steps
        self._num_backwards = 0

    def backward(self, loss: Tensor) -> None:
        self.guard.see(loss)
        loss.backward()
        self._num_backwards += 1

    def step(self) -> None:
        if self._num_backwards < self._grad_accum_steps:
            return
        self._num_backwards = 0
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            pieces = flat.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
        self.guard.judge(gradients)
        with self.guard.over(self.optimizer):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def num_updates(self) -> int:
        return _num_updates(self.optimizer)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def live_parameters(self) -> list[tuple[str, int, Tensor]]:
        return [(name, 0, p.detach()) for name, p in self.module.named_parameters()]

    def fragments(self) -> Iterator[Fragment]:
        yield from _replicated_fragments(self.module, self.optimizer)

    def load(self, source: FragmentSource, num_updates: int) -> None:
        _load_replicated(self.module, self.optimizer, source, num_updates)

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


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
        self.stage = zero_stage
        # Stage 3 empties the parameters of the module; their shapes are needed for loading and for the average.
        self._numels = {name: p.numel() for name, p in module.named_parameters()}
        zero: dict[str, Any] = {"stage": zero_stage, "overlap_comm": False}
        # One bucket as large as the network; left out, it is 2 GB of memory for each engine.
        zero["reduce_bucket_size"] = sum(self._numels.values())
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
        if self.stage > 0:
            # The engine's own forward does this. Without it stage 3 keeps the gradient of the last micro-batch alone.
            self._optimizer.clear_backward_seen_flag()
        # The step has already weighted the loss by the micro-batch's share of the batch.
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        self.guard.judge(self._reduced_gradients())
        if self.stage in (1, 2):
            self._allocate_optimizer_state()  # after its first step DeepSpeed asks for it, made or skipped
        with self.guard.over(self._inner):
            self._engine.step()
        if self.stage == 3 and self._optimizer.overflow:
            # Here DeepSpeed has a judge of its own, over the norm in float64; it does the same, and reads it each step.
            self.guard.skipped.fill_(1.0)

    def _reduced_gradients(self) -> list[Tensor]:
        """Averaged gradients this rank holds at a boundary: all of them at stage 0, else those of its partition."""
        if self.stage == 0:
            return [p.grad for p in self.module.parameters() if p.grad is not None]
        return [g for group in self._optimizer.averaged_gradients.values() for g in group]

    def num_updates(self) -> int:
        return _num_updates(self._inner)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._inner.param_groups:
            group["lr"] = learning_rate

    def live_parameters(self) -> list[tuple[str, int, Tensor]]:
        if self.stage < 3:
            return [(name, 0, p.detach()) for name, p in self.module.named_parameters()]
        return [(name, start, p.ds_tensor.detach()[:size]) for name, p, start, size in self._partitions()]

    def _partitions(self) -> Iterator[tuple[str, Any, int, int]]:
        """Stage 3: name, parameter, offset and true length (without padding) of this rank's partitions."""
        for name, p in self.module.named_parameters():
            length = p.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
            start = min(dist.get_rank() * length, self._numels[name])
            yield name, p, start, min(length, self._numels[name] - start)

    def fragments(self) -> Iterator[Fragment]:
        if self.stage == 0:
            yield from _replicated_fragments(self.module, self._inner)
            return
        self._allocate_optimizer_state()
        if self.stage < 3:
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
        if self.stage == 0:
            _load_replicated(self.module, self._inner, source, num_updates)
            return
        if self.stage == 3 and (gathered := self._optimizer.persistent_parameters):
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
        for partition in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            _adam_states(self._inner, partition)
        if self.stage < 3:
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


def _replicated_fragments(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Fragment]:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name, p in module.named_parameters():
        start, stop = even_share(p.numel(), rank, world_size)
        if start < stop:
            states = _adam_states(optimizer, p)
            tensors = {"parameter": p.detach(), **{s: states[s] for s in ADAM_STATES}}
            yield Fragment(name, start, {key: t.reshape(-1)[start:stop] for key, t in tensors.items()})


def _load_replicated(
    module: nn.Module, optimizer: torch.optim.Optimizer, source: FragmentSource, num_updates: int
) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            states = _adam_states(optimizer, p)
            for state, tensor in {"parameter": p, **{s: states[s] for s in ADAM_STATES}}.items():
                tensor.copy_(source.read(state, name, 0, p.numel()).view_as(tensor))
            states["step"].fill_(num_updates)


def _adam_states(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Adam's state of one parameter, made as torch makes it at the first update if there has been none."""
    state = optimizer.state[p]
    if not state:
        fused = optimizer.param_groups[0].get("fused")
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
        for name in ADAM_STATES:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return state


def _num_updates(optimizer: torch.optim.Optimizer) -> int:
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return int(torch.stack(counts).max()) if counts else 0
