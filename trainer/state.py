"""What a checkpoint holds of a run, and how a rank takes it up again."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.shards import DataError, ShardIndex
from trainer.checkpoint import Checkpoint, timestamp
from trainer.config import TrainConfig
from trainer.config_io import from_dict, to_dict
from trainer.ema import Ema
from trainer.engines import Fragment
from trainer.metrics import StatisticsSum
from trainer.provenance import library_versions
from trainer.ranks import Ranks
from trainer.resume_rules import check_resumable
from trainer.step import Players
from trainer.tracking_store import redact

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """All that changes while a run goes on, on one rank.

    Attributes:
        config, ranks, index: of the run.
        players: the networks in their engines.
        ema: the averaged generator.
    """

    config: TrainConfig
    ranks: Ranks
    index: ShardIndex
    players: Players
    ema: Ema

    def parts(self, statistics: StatisticsSum) -> tuple[dict[str, Iterable[Fragment]], dict[str, dict[str, Tensor]]]:
        """What this rank saves: fragments by section, and groups of small tensors; see `checkpoint.save`."""
        sections = {
            "generator": self.players.generator.fragments(),
            "discriminator": self.players.discriminator.fragments(),
            "ema": self.ema.fragments(),
        }
        return sections, {"statistics": statistics.state(), "buffers": self.buffers()}

    def manifest(self, step: int, mlflow_run_id: str | None) -> dict[str, Any]:
        """What the manifest says of the run after `step`."""
        return {
            "created": timestamp(),
            "images": step * self.config.training.global_batch_size,
            "cursor": {"batch": step},
            "seed": self.config.run.seed,
            "data": self.index.digest,
            "mlflow_run_id": mlflow_run_id,
            "versions": library_versions(),
            "config": json.loads(redact(json.dumps(to_dict(self.config)))),
        }

    def restore(self, checkpoint: Checkpoint, statistics: StatisticsSum) -> None:
        """Take networks, average, optimizer states and sums from a checkpoint.

        Raises:
            ConfigError: the config has changed in what a resumed run must keep.
            DataError: the data set is another one.
            CheckpointError: the checkpoint is of other networks.
        """
        notes = check_resumable(from_dict(checkpoint.manifest["config"], str(checkpoint.path)), self.config)
        if checkpoint.manifest["data"] != self.index.digest:
            raise DataError(
                f"{self.index.shown_location} is not the data set that {checkpoint.path} was trained on: its "
                "index.json differs. Restore that data set, or start a run in another run.directory"
            )
        self.players.generator.load(checkpoint.section("generator"), checkpoint.step)
        self.players.discriminator.load(checkpoint.section("discriminator"), checkpoint.step)
        self.ema.load(checkpoint.section("ema"))
        saved = checkpoint.extras("buffers", 0)
        for name, buffer in self.buffers().items():
            buffer.copy_(saved[name])
        statistics.load(self._statistics_of(checkpoint), self.ranks.device)
        if self.ranks.rank == 0:
            log.info("resuming from %s", checkpoint.path)
            for note in notes:
                log.info("changed since: %s", redact(note))

    def buffers(self) -> dict[str, Tensor]:
        """What the generator's state holds beside its parameters: random but fixed frequencies, for one."""
        module = self.players.generator.module
        parameters = dict(module.named_parameters())
        return {name: value for name, value in module.state_dict().items() if name not in parameters}

    def _statistics_of(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """The sums this rank had, or at another world size everyone's on rank 0: the reduction adds them up anyway."""
        if checkpoint.manifest["world_size"] == self.ranks.world_size:
            return checkpoint.extras("statistics", self.ranks.rank)
        total: dict[str, Tensor] = {}
        for rank in range(checkpoint.manifest["world_size"]):
            for name, value in checkpoint.extras("statistics", rank).items():
                total[name] = total[name] + value if name in total else value
        return total if self.ranks.rank == 0 else {name: torch.zeros_like(value) for name, value in total.items()}
