"""Runs of tiny networks in this process, and tools to read their results."""

import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from data.shards.index import load_index
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig
from trainer.engine.ranks import Ranks
from trainer.rank.progress import Outcome, RunStatus
from trainer.rank.worker import Worker


class Stopper:
    """A driver that requests a stop during step `at`, and records what is reported to it."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.asked, self.seen, self.shown = at, 0, [], []

    def report(self, status: RunStatus) -> None:
        self.seen.append(status)

    def show(self, curves: Mapping[str, float]) -> None:
        self.shown.append(dict(curves))

    def stop_requested(self) -> bool:
        self.asked += 1
        return self.asked == self.at


class Recorder:
    """A tracker that records the curves."""

    run_id = None

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics[step] = dict(metrics)

    def log_image(self, step: int, key: str, path: Path) -> None: ...
    def log_artifact(self, path: Path, folder: str | None = None, register_as: str | None = None) -> None: ...
    def close(self, status: str) -> None: ...


def configure(tiny: Sequence[str], directory: Path, *more: str) -> TrainConfig:
    alone = ("engine.backend=torch", "scaling.world_size=1")
    return load_config("digits", [*tiny, *alone, f"run.directory={directory}", *more])


def train(config: TrainConfig, driver: Stopper | None = None) -> tuple[Outcome, Recorder]:
    ranks, recorder = Ranks.join("cpu", 60), Recorder()
    try:
        worker = Worker(config, ranks, driver or Stopper())
        worker.tracker = recorder
        return worker.run(), recorder
    finally:
        ranks.leave()


def state_of(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything in the checkpoint of a step: weights, Adam's moments, EMA, statistics."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted((directory / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        state |= {f"{file.name[:10]}/{name}": tensor for name, tensor in load_file(file).items()}
    assert state
    return state


def assert_same_state(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]
    assert not different


def damaged_copy(tiny: Sequence[str], target: Path, *numbers: int) -> list[str]:
    """Overrides for a copy of the digits with some images overwritten; `numbers` counts images through the shards."""
    source = Path(next(words for words in tiny if words.startswith("data.path=")).partition("=")[2])
    shutil.copytree(source, target)
    index = load_index(target)
    files = {shard.name: bytearray((target / shard.name).read_bytes()) for shard in index.shards}
    images = []
    for name, content in files.items():
        with tarfile.open(target / name) as archive:
            images += [(content, member) for member in archive if not member.name.endswith(".cls")]
    for number in numbers:
        content, member = images[number]
        content[member.offset_data : member.offset_data + 40] = bytes(40)
    for name, content in files.items():
        (target / name).write_bytes(content)
    return [*tiny, f"data.path={target}", "data.max_bad_percent=5"]
