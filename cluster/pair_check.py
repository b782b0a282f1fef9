"""Checks all-reduce between every pair of nodes and measures its speed. Needs no Ray."""

import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.engine.rendezvous import open_store

MEGABYTES = 32
REPEATS = 3


def rounds(number: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of `number` nodes exactly once, in rounds where each node occurs at most once (circle method)."""
    places: list[int | None] = [*range(number), *([None] if number % 2 else [])]
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        places = [places[0], places[-1], *places[1:-1]]


def all_reduce(rank: int, address: str, port: int, *, device: str, timeout_s: float) -> float:
    """Run all-reduce as one side of a pair.

    Args:
        rank: 0 or 1; rank 0 listens at `address` and `port`.
        address, port: address of rank 0.
        device: cpu (gloo) or gpu (NCCL).
        timeout_s: how long to wait for the other side.

    Returns:
        Bytes of payload per second.

    Raises:
        RuntimeError: no connection, no answer in time, or a wrong sum.
    """
    where = torch.device("cuda", 0) if device == "gpu" else torch.device("cpu")
    dist.init_process_group(
        "nccl" if device == "gpu" else "gloo",
        store=open_store(address, port, rank, 2, timeout_s),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        values = torch.ones(MEGABYTES * 2**20 // 4, device=where)
        dist.all_reduce(values)  # opens the connections
        _wait(where)
        began = time.perf_counter()
        for _ in range(REPEATS):
            dist.all_reduce(values)
        _wait(where)
        elapsed_s = time.perf_counter() - began
        if not bool((values == 2.0 ** (REPEATS + 1)).all()):
            raise RuntimeError("the sum is wrong")
    finally:
        dist.destroy_process_group()
    return REPEATS * MEGABYTES * 2**20 / elapsed_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
