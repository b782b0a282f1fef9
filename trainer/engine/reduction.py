"""Averages gradients over the ranks in buckets, while the backward pass still computes the rest of them.

A backward pass finishes the last layers first, so the first bucket holds the last parameters. Each bucket is one
all-reduce, launched as soon as its gradients are there, on all ranks in the same order. `finish` waits for them, which
an engine may put off until the averages are needed.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
"""Large enough for the full bandwidth of a link, and a fraction of a network's gradients (as in torch's DDP)."""


class Reducer:
    """The gradients of one network, averaged over the ranks. With one rank it does nothing.

    Args:
        parameters: all parameters of the network; some may get no gradient, the same ones on all ranks.
        bucket_bytes: size from which a bucket is full; None: `bucket_bytes_for_exactness`.
        multiplies: multiply by 1 / ranks, as DeepSpeed does, instead of dividing; the last bit can differ.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], bucket_bytes: float | None = None, *, multiplies: bool = False
    ) -> None:
        self._multiplies = multiplies
        self._buckets: list[list[nn.Parameter]] = []
        self._missing: list[int] = []
        self._next = 0
        self._launched: list[tuple[list[Tensor], Tensor, Any]] = []
        self._all_launched = False
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        self._buckets = in_buckets(list(parameters), bucket_bytes or bucket_bytes_for_exactness())
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        for p in self._bucket_of:
            p.register_post_accumulate_grad_hook(self._arrived)

    @property
    def pending(self) -> bool:
        """Whether all-reduces were launched that `finish` will wait for."""
        return bool(self._launched)

    def expect(self) -> None:
        """The next backward pass is the last one of the step: reduce the gradients as they come."""
        self._missing, self._next = [len(bucket) for bucket in self._buckets], 0

    def _arrived(self, p: Tensor) -> None:
        if not self._missing:
            return  # a gradient that more micro-batches will be added to
        self._missing[self._bucket_of[p]] -= 1  # pyright: ignore[reportArgumentType]
        while self._next < len(self._buckets) and self._missing[self._next] == 0:
            self._launch()

    def _launch(self) -> None:
        gradients = [p.grad for p in self._buckets[self._next] if p.grad is not None]
        self._next += 1
        if gradients:
            flat = torch.cat([g.flatten() for g in gradients])
            self._launched.append((gradients, flat, dist.all_reduce(flat, async_op=True)))

    def launch_rest(self) -> None:
        """After the backward pass: launch the buckets that are not complete, because a parameter got no gradient."""
        while self._missing and self._next < len(self._buckets):
            self._launch()
        self._missing = []
        self._all_launched = True

    def finish(self) -> bool:
        """Wait for the all-reduces and put the averages into the parameters' `grad`.

        Returns:
            Whether there is an update to make: `launch_rest` was called since the last `finish`.
        """
        if not self._all_launched:
            return False
        self._all_launched = False
        for gradients, flat, work in self._launched:
            work.wait()
            if self._multiplies:
                flat.mul_(1 / dist.get_world_size())
            else:
                flat.div_(dist.get_world_size())
            pieces = flat.split([g.numel() for g in gradients])
            torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
        self._launched = []
        return True


def in_buckets(parameters: Sequence[nn.Parameter], bucket_bytes: float) -> list[list[nn.Parameter]]:
    """Consecutive parameters in buckets, the last parameters first. A bucket is closed once it is full."""
    buckets: list[list[nn.Parameter]] = [[]]
    held = 0
    for p in reversed(parameters):
        if held >= bucket_bytes:
            buckets.append([])
            held = 0
        buckets[-1].insert(0, p)
        held += p.numel() * p.element_size()
    return buckets


def bucket_bytes_for_exactness() -> float:
    """The size of a bucket with which sums do not depend on the buckets.

    With three or more ranks, gloo adds an element's values in an order that depends on its place in the buffer. There
    one bucket holds everything, so that the sums do not depend on the size of buckets. It is still reduced while other
    work is done.
    """
    return float("inf") if dist.get_backend() == "gloo" and dist.get_world_size() > 2 else BUCKET_BYTES
