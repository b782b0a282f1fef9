"""This process's place among the ranks, and small CPU collectives that keep the ranks in sync."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from trainer.engine import messages
from trainer.engine.rendezvous import init_group, job_secret, prove_membership
from trainer.engine.zero import forget_group

T = TypeVar("T")


@dataclass
class Ranks:
    """The place of this process in the group. Create it with `join`.

    Attributes:
        rank: in [0, world_size).
        world_size: number of ranks.
        device: where this rank computes.
        cpu_group: gloo group for objects and flags, which then need no device synchronization.
    """

    rank: int
    world_size: int
    device: torch.device
    cpu_group: Any

    @classmethod
    def join(cls, device_type: str, timeout_s: float) -> "Ranks":
        """Join the process group of this job; initialize it if necessary.

        RANK, LOCAL_RANK and WORLD_SIZE give this process's place (torchrun and Ray Train set them). Without them there
        is one rank, which still gets a process group, because DeepSpeed needs one.

        Raises:
            OperationError: a rank does not know the job's secret.
            UserError: the job has no secret.
        """
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cpu")
        if device_type == "gpu":
            # A worker may see all GPUs of its host or only its own.
            device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        secret = job_secret() if world_size > 1 else None
        if not dist.is_initialized():
            backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s)
            if world_size > 1:
                init_group(backend, world_size, timeout_s)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        cpu_group = dist.group.WORLD
        if dist.get_backend() != "gloo":
            cpu_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        if secret is not None:
            prove_membership(secret, cpu_group)
        return cls(dist.get_rank(), dist.get_world_size(), device, cpu_group)

    def leave(self) -> None:
        """Destroy the process group.

        Dropping the last reference to a gloo group joins its threads. If a reference survives, those threads release
        the last collective's tensors during interpreter shutdown, which occasionally aborts the process. DeepSpeed
        holds a reference too, and would use the dead group for engines created after the next `join`.
        """
        self.cpu_group = None
        forget_group()
        dist.destroy_process_group()

    @property
    def is_first_of_host(self) -> bool:
        """Whether this rank does what has to be done once on each host."""
        return int(os.environ.get("LOCAL_RANK", 0)) == 0

    def all_do(self, action: Callable[[], T], *failures: type[Exception]) -> T:
        """Do something on every rank, so that a failure of one is one of all. A collective.

        Args:
            action: what this rank does; no collective.
            failures: the expected exceptions, each with a text as its only argument, subclasses before their bases.

        Returns:
            The result of this rank's action.

        Raises:
            Exception: on every rank, the failure of the first rank that had one.
        """
        result, failed = None, None
        try:
            result = action()
        except failures as error:
            failed = next(i for i, kind in enumerate(failures) if isinstance(error, kind)), str(error)
        for of_rank in self.gather(failed):
            if of_rank is not None:
                kind, text = of_rank
                raise failures[kind](text)
        return cast("T", result)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank: JSON values and tensors, see `messages.encode`. Tuples become lists."""
        return messages.broadcast(value, self.cpu_group)

    def gather(self, value: Any) -> Sequence[Any]:
        """Every rank's `value`, ordered by rank, on every rank: as `broadcast`."""
        return messages.all_gather(value, self.cpu_group)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a CPU tensor over the ranks."""
        dist.all_reduce(values, group=self.cpu_group)
        return values

    def sum_on_device(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor on `device` over the ranks, on that device; on a GPU the host does not wait for it."""
        values = values.clone()
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


class Agreement:
    """Lets all ranks agree after each step whether any of them has been asked to stop.

    The reduction is launched before the step and read after it, so the computation hides its latency. Every rank sees
    the same answer after the same step; a request that arrives in between takes effect one step later.
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
        """The result of the last vote."""
        self._work.wait()
        return bool(self._flag.item())
