"""Nothing bad reaches the weights: whether an update is made is decided on the device, by all ranks alike.

An update is skipped if a loss of any rank or the averaged gradient is not finite, or if that gradient is larger than
`guard.max_gradient_norm`. A skipped update leaves parameters, Adam's moments and its count of updates as they are. The
average of the generator goes on: its weights stand still for a step, and a step it is.

On a GPU the host never learns of it here: torch's fused Adam takes the flag as the `found_inf` of its gradient scaling.
Elsewhere the flag is in the host's memory anyway.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class UpdateGuard:
    """The judge over the updates of one network.

    Attributes:
        norm: L2 norm of the averaged gradient of the last update, a scalar on the device.
        skipped: 1.0 if the last update was skipped, else 0.0; a scalar on the device, equal on all ranks.
    """

    def __init__(self, max_gradient_norm: float | None, *, partitioned: bool) -> None:
        """Make the judge.

        Args:
            max_gradient_norm: largest norm with which an update is made; None: any finite one.
            partitioned: each rank sees its own part of the averaged gradient, not the whole.
        """
        self._max_gradient_norm = max_gradient_norm
        self._partitioned = partitioned
        self._loss: Tensor | None = None
        self.norm = torch.zeros(())
        self.skipped = torch.zeros(())

    def see(self, loss: Tensor) -> None:
        """Take in the loss of a micro-batch; what is not finite stays so in the sum."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def judge(self, gradients: Sequence[Tensor]) -> None:
        """Decide on the update that is due. A collective where there are several ranks.

        Args:
            gradients: averaged over the ranks; this rank's part of them if they are partitioned.
        """
        assert self._loss is not None, "no loss was seen since the last update"
        norm = torch.nn.utils.get_total_norm(gradients)
        # Ranks that hold the same gradient agree too: kernels of unequal devices may round it to either side.
        seen = torch.stack((norm.square() if self._partitioned else norm, self._loss.to(norm)))
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size > 1:
            dist.all_reduce(seen)
        self.norm = seen[0].sqrt() if self._partitioned and world_size > 1 else norm
        bad = ~torch.isfinite(seen).all()
        if self._max_gradient_norm is not None:
            bad |= (seen[0].sqrt() if self._partitioned else seen[0] / world_size) > self._max_gradient_norm
        self.skipped = bad.to(torch.float32)
        self._loss = None

    @contextmanager
    def over(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Inside, a step of `optimizer` makes the update or, if it has been judged bad, nothing.

        All that others do around the step goes on, so that the ranks' collectives stay the same.
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
    """In the place of an optimizer's step."""
