"""Moving averages of the generator's parameters, in float32, one fused operation each per step.

There is always one whose decay the caller gives: samples are drawn with it. Others follow a power function of the
number of steps (Karras et al., 2312.02696, section 3.1): theta_average(n) is the mean of theta(m) over m <= n, weighted
by m^gamma. Their width, the weight's standard deviation relative to n, is the same at any length of training, and
averages of two widths at several n give one of any width afterwards (`trainer.average`).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor

from trainer.engine.interface import Engine, Fragment, FragmentSource, even_share

AVERAGE = "average"
"""The state's name in checkpoints; those of power functions are called after their width."""
MIN_WIDTH, MAX_WIDTH = 0.01, 0.28
"""Of power functions; that of the plain mean of all steps is 0.289."""


def power_name(width: float) -> str:
    """Name of the state of a power function in checkpoints."""
    return f"{AVERAGE}-{width:g}"


def is_average(state: str) -> bool:
    """Whether a state of a checkpoint is a moving average."""
    return state == AVERAGE or state.startswith(f"{AVERAGE}-")


def power_exponent(width: float) -> float:
    """The gamma of a width: the root of width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), 2312.02696 Eq. 3."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        if (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class Ema:
    """theta_ema <- decay * theta_ema + (1 - decay) * theta after each update; the first update copies theta.

    Each rank averages what it holds: whole parameters at ZeRO stages 0 to 2, its own partitions at stage 3.
    """

    def __init__(self, engine: Engine, widths: Sequence[float] = ()) -> None:
        """Args:
        engine: holds the parameters.
        widths: of the averages by power functions.
        """
        held = engine.live_parameters()
        self._names = [name for name, _, _ in held]
        self._starts = [start for _, start, _ in held]
        self._live = [tensor for _, _, tensor in held]
        self._exponents = {power_name(width): power_exponent(width) for width in widths}
        self._averages = {state: [tensor.clone() for tensor in self._live] for state in (AVERAGE, *self._exponents)}
        self._partitioned, self._shapes = engine.partitioned, engine.shapes()

    @torch.no_grad()
    def update(self, step: int, decay: float) -> None:
        """Update the averages with the parameters after optimizer step `step` of the stage, from 0."""
        for state, average in self._averages.items():
            if step == 0:
                torch._foreach_copy_(average, self._live)
                continue
            exponent = self._exponents.get(state)
            kept = decay if exponent is None else (step / (step + 1)) ** (exponent + 1)
            torch._foreach_lerp_(average, self._live, 1.0 - kept)

    def full_state(self, state: str = AVERAGE) -> dict[str, Tensor]:
        """All averaged parameters, whole, by name. At stage 3 this is a collective that every rank must call."""
        if not self._partitioned:
            return dict(zip(self._names, self._averages[state], strict=True))
        full: dict[str, Tensor] = {}
        for name, piece in zip(self._names, self._averages[state], strict=True):
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
        for i, (name, start) in enumerate(zip(self._names, self._starts, strict=True)):
            numel = self._live[i].numel()
            first, last = (0, numel) if self._partitioned else even_share(numel, rank, world_size)
            if first < last:
                tensors = {state: all_[i].reshape(-1)[first:last] for state, all_ in self._averages.items()}
                pieces.append(Fragment(name, start + first, tensors))
        return pieces

    @torch.no_grad()
    def load(self, source: FragmentSource) -> None:
        """Load the averages from a checkpoint."""
        for state, average in self._averages.items():
            for name, start, tensor in zip(self._names, self._starts, average, strict=True):
                tensor.copy_(source.read(state, name, start, start + tensor.numel()).view_as(tensor))


def coefficients_for(
    snapshots: Sequence[tuple[float, int]], wanted: tuple[float, int]
) -> tuple[Float64[np.ndarray, " snapshots"], float]:
    """The combination of averages that comes nearest to another one (2312.02696, section 3.2).

    Args:
        snapshots: (width, number of steps) of each average.
        wanted: the same of the average to be made.

    Returns:
        Factors, whose sum is 1, and the distance of the profiles relative to the length of the wanted one.
    """
    profiles = [(power_exponent(width), float(n)) for width, n in (*snapshots, wanted)]
    products = np.array([[_product(*one, *other) for other in profiles] for one in profiles])
    gram, target = products[:-1, :-1], products[:-1, -1]
    scale = 1 / np.sqrt(np.diag(gram))  # profiles of length 1: those of few steps are much longer than the others
    solved = np.linalg.lstsq(gram * scale[:, None] * scale, target * scale, rcond=1e-12)[0] * scale
    factors = solved / solved.sum()
    squared = factors @ gram @ factors - 2 * factors @ target + products[-1, -1]
    return factors, math.sqrt(max(squared, 0.0) / products[-1, -1])


def _product(gamma: float, n: float, other_gamma: float, other_n: float) -> float:
    """Integral of the product of two profiles, (gamma + 1) m^gamma / n^(gamma + 1) for m in [0, n]."""
    if n > other_n:
        gamma, n, other_gamma, other_n = other_gamma, other_n, gamma, n
    ratio = (n / other_n) ** other_gamma / other_n
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * ratio
