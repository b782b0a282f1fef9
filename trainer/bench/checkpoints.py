"""How long a checkpoint blocks training.

A state of a given size is saved several times: blocked until everything is on disk, as without a writer thread, and
blocked only for the copy, as in `checkpoint.writer`. No training runs meanwhile, so the results are those of the disk,
the hash and the memory.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from data.storage.errors import OperationError
from trainer.bench.steps.timing import Report
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.storage import FolderStorage
from trainer.checkpoint.writer import CheckpointWriter
from trainer.engine.interface import Fragment
from trainer.engine.ranks import Ranks

_TENSOR_BYTES = 4 * 10**6


def time_checkpoints(folder: Path, num_bytes: int, rounds: int) -> Report:
    """Save a state of the given size, on one rank.

    Args:
        folder: where to save; holds at most two checkpoints, and existing files stay.
        num_bytes: size of the state, at least 4 MB.
        rounds: number of timed saves.

    Returns:
        Medians over the saves: synchronous_s, from the start of a save until it is committed; held_s, until the step
        can continue; held_share, the median of their quotients, in [0, 1].

    Raises:
        OperationError: a checkpoint cannot be written.
    """
    fragments = [
        Fragment(f"layer{i}.weight", 0, {"parameter": torch.randn(_TENSOR_BYTES // 4)})
        for i in range(num_bytes // _TENSOR_BYTES)
    ]
    ranks = Ranks.join("cpu", 60)
    held: list[float] = []
    whole: list[float] = []
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=folder) as place:
            writer = CheckpointWriter(FolderStorage(Path(place)), ranks, Retention(keep_last=1))
            writer.reserve(num_bytes + 2**20)
            writer.finish()
            for step in range(1, rounds + 1):
                began = time.perf_counter()
                writer.save(step, {"generator": fragments}, {}, {"config": {}})
                held.append(time.perf_counter() - began)
                newest, error = writer.finish()
                whole.append(time.perf_counter() - began)
                if newest != step:
                    raise OperationError(error)
            writer.close()
    finally:
        ranks.leave()
    return {
        "synchronous_s": statistics.median(whole),
        "held_s": statistics.median(held),
        "held_share": statistics.median(short / long for short, long in zip(held, whole, strict=True)),
    }
