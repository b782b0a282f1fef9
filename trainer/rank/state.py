"""What a checkpoint holds, and how a rank restores it."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.shards.index import ShardIndex
from data.storage.files import timestamp
from data.storage.location import DataError
from data.storage.redaction import redact, redact_values
from trainer.algorithm.ema import is_average
from trainer.algorithm.method import PART_NAMES
from trainer.checkpoint.format import Checkpoint, CheckpointError
from trainer.checkpoint.snapshot import trains_with_latent
from trainer.checkpoint.whole import trained_generator
from trainer.config.io import from_dict, to_dict
from trainer.config.resume import check_resumable
from trainer.config.stages import Stage
from trainer.config.train_config import TrainConfig
from trainer.engine.interface import Fragment
from trainer.engine.ranks import Ranks
from trainer.rank.build import Learner, new_networks, silence_latent, start_from_encoder
from trainer.rank.metrics import StatisticsSum
from trainer.tracking.provenance import library_versions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingState:
    """All state of one rank that changes during training.

    Attributes:
        config, ranks, index: the run's config, ranks and data set.
        stage: the stage of the run.
        learner: networks, average, and counts of skipped updates.
    """

    config: TrainConfig
    stage: Stage
    ranks: Ranks
    index: ShardIndex
    learner: Learner

    def parts(self, statistics: StatisticsSum) -> tuple[dict[str, Iterable[Fragment]], dict[str, dict[str, Tensor]]]:
        """What this rank saves: fragments by section, and groups of small tensors; see `CheckpointWriter.save`."""
        engines = self.learner.players.engines
        sections: dict[str, Iterable[Fragment]] = {PART_NAMES[part]: e.fragments() for part, e in engines.items()}
        sections["ema"] = self.learner.ema.fragments()
        extras = {"statistics": statistics.state(), "buffers": self.learner.generator_buffers()}
        running = self.learner.players.running
        return sections, extras | {name: state.state() for name, state in running.items()}

    def expected_bytes(self) -> int:
        """Approximate size of what this rank saves: parameters, Adam's two moments, and the generator's averages."""
        total = 0
        for part, engine in self.learner.players.engines.items():
            averages = 1 + len(self.stage.config.training.power_ema.widths) if part == "g" else 0
            learns = {name: p.requires_grad for name, p in engine.module.named_parameters()}
            held = sum(t.numel() * (averages + (3 if learns[name] else 1)) for name, _, t in engine.live_parameters())
            total += 4 * (held if engine.partitioned else -(-held // self.ranks.world_size))
        return total + total // 32 + 2**16  # margin for ZeRO's uneven shares and for small tensors

    def manifest(self, step: int, mlflow_run_id: str | None) -> dict[str, Any]:
        """The manifest of the run after `step`."""
        return {
            "created": timestamp(),
            "images": step * self.config.training.global_batch_size,
            "cursor": {"batch": step},
            "updates": {part: engine.num_updates() for part, engine in self.learner.players.engines.items()},
            "skipped_in_row": self.learner.skipped.rows(),
            "seed": self.config.run.seed,
            "data": self.index.digest,
            "mlflow_run_id": mlflow_run_id,
            "versions": library_versions(),
            "zero_stages": self.zero_stages(),
            "config": redact_values(to_dict(self.config)),
        }

    def load(self, checkpoint: Checkpoint, statistics: StatisticsSum) -> None:
        """Continue from a checkpoint: of this stage, or of the end of the stage before.

        Raises:
            ConfigError: a setting that a resumed run must keep has changed.
            DataError: the data set is a different one.
            CheckpointError: the checkpoint belongs to different networks.
        """
        notes = check_resumable(from_dict(checkpoint.manifest["config"], str(checkpoint.path)), self.config)
        if checkpoint.manifest.get("data") != self.index.digest:
            raise DataError(
                f"{self.index.shown_location} is not the data set that {checkpoint.path} was trained on: its "
                "shards differ. Restore that data set, or start a new run in another run.directory"
            )
        if checkpoint.step == self.stage.first_step:
            self._begin(checkpoint, statistics)
        else:
            self._restore(checkpoint, statistics)
        if self.ranks.rank == 0:
            for note in notes:
                log.info("changed since: %s", redact(note))

    def _begin(self, checkpoint: Checkpoint, statistics: StatisticsSum) -> None:
        """Begin the stage with the averaged generator of the stage before."""
        averaged, before = trained_generator(checkpoint)
        networks, learner = new_networks(self.stage.config), self.learner
        networks["g"].load_state_dict(averaged)
        start_from_encoder(networks, self.stage.config, self.ranks)
        if not trains_with_latent(before):
            silence_latent(networks, self.stage.config, self.ranks)
        for part, engine in learner.players.engines.items():
            engine.load(_NewWeights(networks[part]), 0)
        learner.ema.load(_NewWeights(networks["g"]))
        learner.skipped.load_rows({})
        for state in learner.players.running.values():
            state.load({})
        for name, buffer in learner.generator_buffers().items():
            buffer.copy_(averaged[name])
        statistics.load({}, self.ranks.device)
        if self.ranks.rank == 0:
            log.info("stage %s begins with the averaged generator of %s", self.stage.name, checkpoint.path)

    def _restore(self, checkpoint: Checkpoint, statistics: StatisticsSum) -> None:
        """Load networks, average, optimizer states and sums of this stage."""
        began = time.monotonic()
        learner, updates = self.learner, checkpoint.manifest.get("updates", {})
        for part, engine in learner.players.engines.items():
            engine.load(checkpoint.section(PART_NAMES[part]), updates.get(part, checkpoint.step))
        learner.skipped.load_rows(checkpoint.manifest.get("skipped_in_row", {}))
        learner.ema.load(checkpoint.section("ema"))
        buffers = learner.generator_buffers()
        for name, saved in checkpoint.buffers(buffers).items():
            buffers[name].copy_(saved)
        for name, state in learner.players.running.items():
            try:
                state.load(checkpoint.extras(name, 0))
            except ValueError as error:
                raise CheckpointError(f"{checkpoint.path}: {error}") from None
        statistics.load(self._statistics_of(checkpoint), self.ranks.device)
        if self.ranks.rank == 0:
            log.info("resuming from %s", checkpoint.path)
            before = (checkpoint.manifest["world_size"], checkpoint.manifest.get("zero_stages"))
            after = (self.ranks.world_size, self.zero_stages())
            if before != after:
                took_s = time.monotonic() - began
                log.info("converted from %s ranks, ZeRO %s, to %s ranks, ZeRO %s, in %.1f s", *before, *after, took_s)

    def zero_stages(self) -> dict[str, int]:
        """ZeRO stage of each network."""
        return {"g": self.config.engine.zero_stage_g, "d": self.config.engine.zero_stage_d}

    def _statistics_of(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """This rank's sums. If the world size has changed, rank 0 gets the total and the others get zeros."""
        if checkpoint.manifest["world_size"] == self.ranks.world_size:
            return self._sums_of(checkpoint, self.ranks.rank)
        total: dict[str, Tensor] = {}
        for rank in range(checkpoint.manifest["world_size"]):
            for name, value in self._sums_of(checkpoint, rank).items():
                total[name] = total[name] + value if name in total else value
        return total if self.ranks.rank == 0 else {name: torch.zeros_like(value) for name, value in total.items()}

    def _sums_of(self, checkpoint: Checkpoint, rank: int) -> dict[str, Tensor]:
        sums, num_timesteps = checkpoint.extras("statistics", rank), self.stage.config.diffusion.num_timesteps
        for name, value in sums.items():
            if value.dtype != torch.float32 or value.shape not in ((), (num_timesteps,)):
                raise CheckpointError(f"{checkpoint.path}: its sum {name} is no statistic of a run with this config")
        return sums


class _NewWeights:
    """A FragmentSource of weights that no optimizer has updated."""

    def __init__(self, network: nn.Module) -> None:
        self._weights = {name: p.detach().reshape(-1) for name, p in network.named_parameters()}

    def read(self, state: str, name: str, start: int, stop: int) -> Tensor:
        """Elements of a parameter, also as its average; zeros as Adam's moments."""
        piece = self._weights[name][start:stop]
        return piece if state == "parameter" or is_average(state) else torch.zeros_like(piece)
