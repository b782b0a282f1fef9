"""Joins a group as rank 1 without the job's secret, and sends a pickle in place of its proof.

Not a test itself: `test_rendezvous.py` starts it. Arguments: port of the group's store, file that the pickle would
make.
"""

import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path(sys.argv[2]),))


if __name__ == "__main__":
    store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), 2, False, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=timedelta(seconds=60))
    for _ in range(2):  # the nonces, then the proofs
        content = bytearray(pickle.dumps(Evil())[:32].ljust(32, b"."))
        dist.all_gather(
            [torch.empty(32, dtype=torch.uint8) for _ in range(2)], torch.frombuffer(content, dtype=torch.uint8)
        )
    os._exit(0)
