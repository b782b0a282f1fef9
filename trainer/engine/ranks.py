"""Who this process is among the ranks, and the few small collectives on the CPU that keep them together."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.engine.zero import forget_group

T = TypeVar("T")


@dataclass
class Ranks:
    """The place of this process in the group. Make it with `join`.

    Attributes:
        rank: in [0, world_size).
        world_size: number of ranks.
        device: where this rank computes.
        cpu_group: gloo group for objects and flags, so that they need no device synchronisation.
    """

    rank: int
    world_size: int
    device: torch.device
    cpu_group: Any

    @classmethod
    def join(cls, device_type: str, timeout_s: float) -> "Ranks":
        """Join the process group of this job, starting it if nobody has.

        RANK, LOCAL_RANK and WORLD_SIZE say where this process stands (torchrun and Ray Train set them); without them
        it is alone. A group of one is a group too: DeepSpeed wants one.
        """
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cpu")
        if device_type == "gpu":
            # A worker may be shown all GPUs of its host, or its own alone.
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s)
            if world_size > 1:
                dist.init_process_group(backend, timeout=timeout)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        cpu_group = dist.group.WORLD
        if dist.get_backend() != "gloo":
            cpu_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return cls(dist.get_rank(), dist.get_world_size(), device, cpu_group)

    def leave(self) -> None:
        """Take the process group down.

        The last reference to a gloo group joins its threads. One held longer lets them release the tensors of the last
        collective while the interpreter ends, which now and then aborts the process. DeepSpeed holds one too, and would
        take it for the world of engines that are made after the next `join`.
        """
        self.cpu_group = None
        forget_group()
        dist.destroy_process_group()

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def gather(self, value: T) -> Sequence[T]:
        """Every rank's `value` in the order of ranks, on every rank."""
        boxes: list[Any] = [None] * self.world_size
        dist.all_gather_object(boxes, value, group=self.cpu_group)
        return boxes

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a CPU tensor over the ranks."""
        dist.all_reduce(values, group=self.cpu_group)
        return values


class Agreement:
    """All ranks agree after each step whether one of them has been asked to stop.

    The reduction is launched before the step and read after it, so that its latency hides behind the computation. Every
    rank sees the same answer after the same step; a request that arrives in between is seen one step later.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None

    def propose(self, stop: bool) -> None:
        """Launch the vote of one step."""
        self._flag.fill_(int(stop))
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._ranks.cpu_group, async_op=True)

    def reached(self) -> bool:
        """The result of the vote that was launched last."""
        self._work.wait()
        return bool(self._flag.item())
