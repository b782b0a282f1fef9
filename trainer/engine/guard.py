"""Keeps bad updates away from the weights. The decision is made on the device and is the same on all ranks.

An update is skipped if a loss on any rank or the averaged gradient is not finite, or if the gradient's norm exceeds
`guard.max_gradient_norm`. A skipped update leaves parameters, Adam's moments and its update count unchanged. The
generator's average is still updated, with the unchanged weights: a skipped update counts as a step.

On a GPU the decision needs no synchronization with the host: torch's fused Adam takes the flag as the `found_inf` of
its gradient scaling. On a CPU the flag is in the host's memory anyway.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class UpdateGuard:
    """Decides which updates of one network are skipped.

    Attributes:
        norm: L2 norm of the averaged gradient of the last update, a scalar on the device.
        skipped: 1.0 if the last update was skipped, else 0.0; a scalar on the device, equal on all ranks. Both change
            in place: a recorded update writes into the same memory each time.
    """

    def __init__(self, max_gradient_norm: float | None, *, partitioned: bool, like: Tensor | None = None) -> None:
        """Create a guard.

        Args:
            max_gradient_norm: updates with a larger gradient norm are skipped; None: any finite norm is allowed.
            partitioned: whether each rank holds only its own part of the averaged gradient.
            like: a gradient has its device and type; None: float32 on the CPU.
        """
        self._max_gradient_norm = max_gradient_norm
        self._partitioned = partitioned
        self._loss: Tensor | None = None
        like = torch.zeros(()) if like is None else like
        self.norm = torch.zeros((), dtype=like.dtype, device=like.device)
        self.skipped = torch.zeros((), dtype=torch.float32, device=like.device)  # as optimizers take it

    def see(self, loss: Tensor) -> None:
        """Add the loss of a micro-batch; a non-finite loss makes the sum non-finite."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def judge(self, gradients: Sequence[Tensor]) -> None:
        """Decide whether the next update is made. A collective if there are several ranks.

        Args:
            gradients: averaged over the ranks; only this rank's part if they are partitioned.
        """
        assert self._loss is not None, "no loss was seen since the last update"
        norm = torch.nn.utils.get_total_norm(gradients)
        # Ranks that hold the same gradient must agree as well: different devices may round its norm differently.
        seen = torch.stack((norm.square() if self._partitioned else norm, self._loss.to(norm)))
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size > 1:
            dist.all_reduce(seen)
        self.norm.copy_(seen[0].sqrt() if self._partitioned and world_size > 1 else norm)
        bad = ~torch.isfinite(seen).all()
        if self._max_gradient_norm is not None:
            bad |= (seen[0].sqrt() if self._partitioned else seen[0] / world_size) > self._max_gradient_norm
        self.skipped.copy_(bad)
        self._loss = None

    @contextmanager
    def over(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside, a step of `optimizer` makes the update, or does nothing if the update was judged bad.

        Only the optimizer's own step is replaced; code around it still runs, so the ranks' collectives stay in sync.
        """
        name, value = "found_inf", self.skipped
        if not optimizer.param_groups[0].get("fused"):
            if not self.skipped:
                yield
                return
            name, value = "step", _no_step
        setattr(optimizer, name, value)
        try:
            yield
        finally:
            delattr(optimizer, name)


def _no_step(closure: object = None) -> None:
    """Replaces an optimizer's step."""
