"""The plain torch engine, and Adam's state when every rank holds all of it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engine.frozen import learning
from trainer.engine.guard import UpdateGuard
from trainer.engine.interface import Fragment, FragmentSource, even_share
from trainer.engine.reduction import Reducer

ADAM_STATES = ("exp_avg", "exp_avg_sq")


def _undecorated(method: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(method, "__wrapped__", method)


class EagerAdam(torch.optim.Adam):
    """Torch's Adam, never itself compiled: without the decorators that keep torch's compiler out of it.

    Those decorators import the compiler, which would take a fifth of the time that a rank needs to start.
    """

    add_param_group = _undecorated(torch.optim.Adam.add_param_group)
    zero_grad = _undecorated(torch.optim.Adam.zero_grad)
    state_dict = _undecorated(torch.optim.Adam.state_dict)
    load_state_dict = _undecorated(torch.optim.Adam.load_state_dict)
    step = torch.no_grad()(_undecorated(torch.optim.Adam.step))


def make_adam(
    module: nn.Module,
    device: torch.device,
    *,
    beta1: float = 0.5,
    beta2: float = 0.9,
    eps: float = 1e-8,
    recorded: bool = False,
) -> torch.optim.Adam:
    """Adam over all parameters that learn. The learning rate is set before each update.

    Args:
        module: the network, on its device.
        device: of the network.
        beta1, beta2, eps: see `AdamConfig`.
        recorded: its updates are recorded, so its learning rate has to be a tensor: float64, or float32 on a GPU, as
            torch's kernel for GPUs has it.
    """
    betas, fused = (beta1, beta2), device.type in ("cuda", "cpu")
    adam = EagerAdam(learning(module), lr=0.0, betas=betas, eps=eps, fused=fused, capturable=recorded)
    if recorded:
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        for group in adam.param_groups:
            group["lr"] = torch.zeros((), dtype=dtype, device=device)
    return adam


class TorchEngine:
    """The plain torch engine: the gradients are averaged in buckets, and every rank holds all parameters and state."""

    partitioned = False

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        grad_accum_steps: int,
        max_gradient_norm: float | None,
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.guard = UpdateGuard(max_gradient_norm, partitioned=False, like=next(module.parameters()))
        self._grad_accum_steps = grad_accum_steps
        self._num_backwards = 0
        self._reducer = Reducer(learning(module))

    def backward(self, loss: Tensor) -> None:
        self.guard.see(loss)
        self._num_backwards += 1
        if self._num_backwards == self._grad_accum_steps:
            self._reducer.expect()
        loss.backward()

    def step(self, *, wait: bool = True) -> None:
        if self._num_backwards < self._grad_accum_steps:
            return
        self._num_backwards = 0
        self._reducer.launch_rest()
        if wait or not self._reducer.pending:
            self.finish()

    def finish(self) -> None:
        if not self._reducer.finish():
            return
        self.guard.judge([p.grad for p in self.module.parameters() if p.grad is not None])
        with self.guard.over(self.optimizer):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def num_updates(self) -> int:
        return count_updates(self.optimizer)

    def set_rates(self, learning_rate: float, beta2: float | None = None) -> None:
        set_rates(self.optimizer, learning_rate, beta2)

    def numbers(self) -> object:
        return [group["betas"] for group in self.optimizer.param_groups]

    def live_parameters(self) -> list[tuple[str, int, Tensor]]:
        return [(name, 0, p.detach()) for name, p in self.module.named_parameters()]

    def shapes(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self.module.named_parameters()}

    def fragments(self) -> Iterator[Fragment]:
        yield from replicated_fragments(self.module.named_parameters(), self.optimizer)

    def load(self, source: FragmentSource, num_updates: int) -> None:
        load_replicated(self.module, self.optimizer, source, num_updates)

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, beta2: float | None) -> None:
    """As `Engine.set_rates`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
        if beta2 is not None:
            group["betas"] = (group["betas"][0], beta2)


def replicated_fragments(
    parameters: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> Iterator[Fragment]:
    """This rank's even share of each parameter and its state, when all ranks hold the whole."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name, p in parameters:
        start, stop = even_share(p.numel(), rank, world_size)
        if start < stop:
            tensors = {"parameter": p.detach(), **moments(optimizer, p)}
            yield Fragment(name, start, {key: t.reshape(-1)[start:stop] for key, t in tensors.items()})


def load_replicated(
    module: nn.Module, optimizer: torch.optim.Optimizer, source: FragmentSource, num_updates: int
) -> None:
    """Load whole parameters and their state from `source`."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            for state, tensor in {"parameter": p, **moments(optimizer, p)}.items():
                tensor.copy_(source.read(state, name, 0, p.numel()).view_as(tensor))
            if p.requires_grad:
                adam_states(optimizer, p)["step"].fill_(num_updates)


def moments(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Adam's two moments of one parameter by name; none if it is frozen."""
    return {name: adam_states(optimizer, p)[name] for name in ADAM_STATES} if p.requires_grad else {}


def adam_states(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """Adam's state of one parameter. Before the first update it is created the way torch would."""
    state = optimizer.state[p]
    if not state:
        fused = optimizer.param_groups[0].get("fused")
        state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
        for name in ADAM_STATES:
            state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return state


def count_updates(optimizer: torch.optim.Optimizer) -> int:
    """Number of updates that Adam has made. Waits for the device."""
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return int(torch.stack(counts).max()) if counts else 0
