"""How long a checkpoint holds training: `python -m trainer.checkpoint_bench --mb 1000`.

A state of that size is saved three times in turn: held until all is on the disk, as without a thread beside training,
and held for the copy alone, as `checkpoint_writer` does. Training itself stands still meanwhile, so that the figures
are those of the disk, the hash and the memory.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trainer.checkpoint.retention import Retention
from trainer.checkpoint.storage import FolderStorage
from trainer.checkpoint.writer import CheckpointWriter
from trainer.engine.interface import Fragment
from trainer.engine.ranks import Ranks

_TENSOR_BYTES = 4 * 10**6


@dataclass(frozen=True)
class Timing:
    """Seconds, each the median of the rounds.

    Attributes:
        synchronous_s: from the start of a save until it is a checkpoint.
        held_s: until the step can go on.
    """

    synchronous_s: float
    held_s: float

    @property
    def share(self) -> float:
        """Part of the synchronous time for which the step is held."""
        return self.held_s / self.synchronous_s


def measure(folder: Path, num_bytes: int, rounds: int) -> Timing:
    """Save a state of so many bytes, on one rank.

    Args:
        folder: where; it holds two checkpoints at most, and what was there stays.
        num_bytes: size of the state, at least 4 MB.
        rounds: saves that are timed.
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
                    raise OSError(error)
            writer.close()
    finally:
        ranks.leave()
    return Timing(statistics.median(whole), statistics.median(held))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.checkpoint_bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--mb", type=int, default=1000, help="size of the state in 10^6 bytes (default 1000)")
    parser.add_argument("--rounds", type=int, default=3, help="saves (default 3)")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()), help="folder on the disk to measure")
    options = parser.parse_args(arguments)
    if options.mb < 4 or options.rounds < 1 or not options.out.is_dir():
        parser.error("--mb must be at least 4, --rounds at least 1, and --out a folder")
    try:
        timing = measure(options.out, options.mb * 10**6, options.rounds)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"state                {options.mb} MB, {options.rounds} rounds, medians")
    print(f"synchronous          {timing.synchronous_s:.3f} s")
    print(f"step held            {timing.held_s:.3f} s, {100 * timing.share:.1f}% of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
