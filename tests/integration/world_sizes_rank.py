"""One rank of the test of world sizes: the same runs for any number of ranks, and one state to and from all of them.

Not a test itself: `test_world_sizes.py` runs it with torchrun, for 1, 2, 3 and 4 ranks in this order, in one folder.

    torchrun --standalone --nproc-per-node 2 -m tests.integration.world_sizes_rank FOLDER OVERRIDE ...

Rank 0 leaves FOLDER/world-N.json: losses of each step, digests of what each sample drew, what was lost of the state.
"""

import argparse
import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn  # imported later, its default arguments would hold on to the group past its end
from torch import Tensor

from models.diffusion import Diffusion
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.pairs import MicroBatch, Pair, RawBatch
from trainer.checkpoint.format import FORMAT_VERSION, Checkpoint, newest_valid, rank_file
from trainer.checkpoint.part import HashingChunks, HostMemory
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig, num_steps
from trainer.engine.ranks import Ranks
from trainer.rank.hooks import DrawGrid
from trainer.rank.metrics import StatisticsSum
from trainer.rank.progress import RunStatus
from trainer.rank.worker import Worker
from trainer.tracking.tracker import NullTracker

NUM_STEPS = 16
MOVES = {1: (0, 0, 6), 2: (1, 1, 10), 3: (2, 2, 13), 4: (3, 2, NUM_STEPS)}
"""The run that changes: ranks, ZeRO stages of G and D, and the step after which the next number of ranks takes over."""
MICRO_BATCH_SIZES = {1: 16, 2: 4, 3: 4, 4: 4}
"""Of each number of ranks: 1, 2, 2 and 1 forward passes, those of 3 ranks uneven."""
STAGES = ((0, 0), (1, 1), (2, 2), (3, 2))
LOSSES = ("loss_d_real", "loss_d_fake", "loss_g")


class StopAt:
    """A driver that asks to stop while a step is under way, counted from 1 and from the start of the attempt."""

    def __init__(self, step: int) -> None:
        self._step, self._begun = step, 0

    def report(self, status: RunStatus) -> None: ...

    def show(self, curves: Mapping[str, float]) -> None: ...

    def stop_requested(self) -> bool:
        self._begun += 1
        return self._begun == self._step


class Curves(NullTracker):
    """Keeps the losses of each step."""

    def __init__(self) -> None:
        self.losses: dict[int, list[float]] = {}

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.losses[step] = [metrics[name] for name in LOSSES]


@contextmanager
def recorded_draws(digests: dict[str, list[str]], dtype: torch.dtype) -> Iterator[None]:
    """Inside, what each sample draws is digested, by step and sample, and computed on in `dtype`."""
    draw = Adversarial.draw

    def drawing(self: Adversarial, raw: RawBatch, diffusion: Diffusion) -> MicroBatch:
        batch, draws = draw(self, raw, diffusion), raw.draws
        if batch.share > 0:
            drawn = [raw.images.contiguous()]
            for pair in (batch.pair_d, batch.pair_g):
                assert pair.dropout
                drawn += [pair.t, pair.x_tm1, pair.x_t, pair.z, pair.noise_posterior, pair.dropout(1, (64,), 0.1)]
            for i, sample in enumerate(draws.samples.tolist()):
                content = b"".join(tensor[i].numpy().tobytes() for tensor in drawn)
                digests[str(int(draws.step))].append(f"{sample} {hashlib.sha256(content).hexdigest()}")
        return replace(batch, pair_d=_in(dtype, batch.pair_d), pair_g=_in(dtype, batch.pair_g))

    Adversarial.draw = drawing
    try:
        yield
    finally:
        Adversarial.draw = draw


@contextmanager
def without_grids() -> Iterator[None]:
    """Inside, no grid is drawn: that is done in float32."""
    run = DrawGrid.run
    DrawGrid.run = lambda self, loop: None
    try:
        yield
    finally:
        DrawGrid.run = run


def _in(dtype: torch.dtype, pair: Pair) -> Pair:
    floats = {name: getattr(pair, name).to(dtype) for name in ("x_tm1", "x_t", "z", "noise_posterior")}
    return replace(pair, **floats)


class Runs:
    """The runs of one number of ranks."""

    def __init__(self, ranks: Ranks, folder: Path, overrides: Sequence[str]) -> None:
        self.ranks, self.folder, self.overrides = ranks, folder, overrides

    def config(self, name: str, *more: str) -> TrainConfig:
        sizes = (
            f"scaling.world_size={self.ranks.world_size}",
            f"training.micro_batch_size={MICRO_BATCH_SIZES[self.ranks.world_size]}",
        )
        coarse = "training.adam.eps=1e-4"  # the usual one amplifies rounding
        return load_config("digits", [*self.overrides, *sizes, coarse, *more, f"run.directory={self.folder / name}"])

    def train(
        self, config: TrainConfig, *, stop_at: int | None = None, dtype: torch.dtype = torch.float32
    ) -> dict[str, Any]:
        """Losses by step, and the digests of all samples by step; to the end, if `stop_at` names no step before it."""
        stop_at = stop_at or num_steps(config)
        curves, digests = Curves(), defaultdict(list)
        torch.set_default_dtype(dtype)
        try:
            worker = Worker(config, self.ranks, StopAt(stop_at))
            worker.tracker = curves
            if worker.checkpoint:
                worker.driver = StopAt(stop_at - worker.checkpoint.step)
            with recorded_draws(digests, dtype), without_grids():
                worker.run()
            worker.close()
        finally:
            torch.set_default_dtype(torch.float32)
        everyone: dict[str, list[str]] = defaultdict(list)
        for part in self.ranks.gather(dict(digests)):
            for step, lines in part.items():
                everyone[step] += lines
        return {"losses": curves.losses, "draws": {step: sorted(lines) for step, lines in everyone.items()}}

    def round_trip(self, canonical: Checkpoint, stage_g: int, stage_d: int) -> list[str]:
        """Which states differ after this number of ranks has read `canonical` and written it anew."""
        name = f"state-{self.ranks.world_size}-{stage_g}-{stage_d}"
        stages = (f"engine.zero_stage_g={stage_g}", f"engine.zero_stage_d={stage_d}")
        worker = Worker(self.config(name, *stages), self.ranks, StopAt(1))
        sums = StatisticsSum(worker.learner.statistics)
        worker.state.load(canonical, sums)
        path = self.folder / name
        path.mkdir(exist_ok=True)
        file = rank_file(self.ranks.rank)
        chunks = HashingChunks(HostMemory(self.ranks.device).take(*worker.state.parts(StatisticsSum(()))))
        (path / file).write_bytes(b"".join(chunks))
        files = {name: {} for name in self.ranks.gather(file)}
        written = Checkpoint(path, {"format_version": FORMAT_VERSION, "step": canonical.step, "files": files})
        different: list[str] = []
        if self.ranks.rank == 0:
            engines = worker.learner.players.engines
            assert [getattr(engines[part], "_stage", None) for part in ("g", "d")] == [stage_g, stage_d]
            ours, theirs = (_whole_state(checkpoint) for checkpoint in (written, canonical))
            different = [key for key in ours | theirs if not torch.equal(ours[key], theirs[key])]
        worker.close()
        return self.ranks.broadcast(different)


def _whole_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every flattened parameter, moment and average, whose pieces must lie end to end."""
    whole: dict[str, Tensor] = {}
    for name in ("generator", "discriminator", "ema"):
        section = checkpoint.section(name)
        for key, parts in section._pieces.items():
            ends = [part.stop(key) for part in parts]
            assert [part.starts[key] for part in parts] == [0, *ends[:-1]], key
            _, state, parameter = key.split("/", 2)
            whole[key] = section.read(state, parameter, 0, ends[-1])
    return whole


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="+")
    parser.add_argument("--usual-eps", action="store_true", help="only the run with Adam's usual eps")
    options = parser.parse_args()
    ranks = Ranks.join("cpu", 120)
    runs = Runs(ranks, options.folder, options.overrides)
    world = ranks.world_size
    plain, found = "engine.backend=torch", dict[str, Any]()
    if options.usual_eps:
        found["usual eps"] = runs.train(runs.config(f"usual-{world}", plain, "training.adam.eps=1e-8"))
        _leave(ranks, options.folder, found)
        return
    found["fp64"] = runs.train(runs.config(f"fp64-{world}", plain), dtype=torch.float64)
    if world != 3:  # there float64 says enough
        found["fp32"] = runs.train(runs.config(f"fp32-{world}", plain))
    stage_g, stage_d, until = MOVES[world]
    stages = (f"engine.zero_stage_g={stage_g}", f"engine.zero_stage_d={stage_d}")
    found["moved"] = runs.train(runs.config("moved", *stages), stop_at=until)
    if world == 1:  # one file, before others continue the run
        shutil.copytree(options.folder / "moved" / "checkpoints", options.folder / "canonical")
    canonical = newest_valid(options.folder / "canonical")
    assert canonical
    found["different"] = {f"{g}/{d}": runs.round_trip(canonical, g, d) for g, d in STAGES}
    _leave(ranks, options.folder, found)


def _leave(ranks: Ranks, folder: Path, found: Mapping[str, Any]) -> None:
    if ranks.rank == 0:
        (folder / f"world-{ranks.world_size}.json").write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main()
