"""A rank's part of each global batch, and the stream of its micro-batches."""

from dataclasses import dataclass

from data.shards.index import ShardIndex
from data.stream.batches import BatchIterator
from data.stream.pipeline import open_batches
from trainer.config.train_config import TrainConfig, split_batch


@dataclass(frozen=True)
class Share:
    """This rank's part of each global batch.

    Attributes:
        start, stop: range in the global batch.
        micro_batch_size: largest number of images in one forward pass.
        global_batch_size: images per step over all ranks.
        grad_accum_steps: forward passes per update, the same on all ranks.
        group_size: images that must stay in one forward pass.
    """

    start: int
    stop: int
    micro_batch_size: int
    global_batch_size: int
    grad_accum_steps: int
    group_size: int

    @classmethod
    def of(cls, config: TrainConfig, rank: int, world_size: int) -> "Share":
        """The contiguous share of `rank`."""
        split = split_batch(config)
        assert split.world_size == world_size, f"{world_size} ranks started, the config plans {split.world_size}"
        return cls(
            *split.share(rank),
            split.micro_batch_size,
            split.global_batch_size,
            split.grad_accum_steps,
            split.group_size,
        )

    @property
    def num_micro_batches(self) -> int:
        """Forward passes with images of this rank: grad_accum_steps, or one less."""
        return -(-(self.stop - self.start) // self.micro_batch_size)


def open_share(config: TrainConfig, index: ShardIndex, share: Share, first_batch: int, *, pin: bool) -> BatchIterator:
    """This rank's micro-batches from batch `first_batch` on; `pin` puts them into page-locked memory, for a GPU."""
    return open_batches(
        config.data,
        index,
        seed=config.run.seed,
        global_batch_size=share.global_batch_size,
        share=(share.start, share.stop),
        micro_batch_size=share.micro_batch_size,
        first_batch=first_batch,
        pin_memory=pin,
    )
