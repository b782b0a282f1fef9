"""Exponential moving average of the generator's parameters, in float32, one fused operation per step."""

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.engine.interface import Engine, Fragment, FragmentSource, even_share


class Ema:
    """theta_ema <- decay * theta_ema + (1 - decay) * theta after each update; the first update copies theta.

    Each rank averages what it holds: whole parameters at ZeRO stages 0 to 2, its own partitions at stage 3.
    """

    def __init__(self, engine: Engine) -> None:
        held = engine.live_parameters()
        self._names = [name for name, _, _ in held]
        self._starts = [start for _, start, _ in held]
        self._live = [tensor for _, _, tensor in held]
        self._average = [tensor.clone() for tensor in self._live]
        self._partitioned, self._shapes = engine.partitioned, engine.shapes()

    @torch.no_grad()
    def update(self, step: int, decay: float) -> None:
        """Update the average with the parameters after optimizer step `step` of the stage, from 0."""
        if step == 0:
            torch._foreach_copy_(self._average, self._live)
        else:
            torch._foreach_lerp_(self._average, self._live, 1.0 - decay)

    def full_state(self) -> dict[str, Tensor]:
        """All averaged parameters, whole, by name. At stage 3 this is a collective that every rank must call."""
        if not self._partitioned:
            return dict(zip(self._names, self._average, strict=True))
        full: dict[str, Tensor] = {}
        for name, piece in zip(self._names, self._average, strict=True):
            shape = self._shapes[name]
            numel = shape.numel()
            length = -(-numel // dist.get_world_size())
            padded = torch.zeros(length, device=piece.device)
            padded[: piece.numel()] = piece
            gathered = torch.empty(length * dist.get_world_size(), device=piece.device)
            dist.all_gather_into_tensor(gathered, padded)
            full[name] = gathered[:numel].view(shape)
        return full

    def fragments(self) -> list[Fragment]:
        """The pieces this rank saves; over all ranks they cover each parameter exactly once."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        pieces: list[Fragment] = []
        for name, start, tensor in zip(self._names, self._starts, self._average, strict=True):
            first, last = (0, tensor.numel()) if self._partitioned else even_share(tensor.numel(), rank, world_size)
            if first < last:
                pieces.append(Fragment(name, start + first, {"average": tensor.reshape(-1)[first:last]}))
        return pieces

    @torch.no_grad()
    def load(self, source: FragmentSource) -> None:
        """Load the average from a checkpoint."""
        for name, start, tensor in zip(self._names, self._starts, self._average, strict=True):
            tensor.copy_(source.read("average", name, start, start + tensor.numel()).view_as(tensor))
