"""How a global batch is split over the ranks and over the forward passes of a rank.

Contiguous groups of the minibatch deviation are neighbours in the global batch. Each rank gets whole groups, as evenly
as possible, so the statistics of a batch do not depend on the number of ranks. Strided groups spread over a whole
micro-batch, so all micro-batches must have the same size.
"""

from dataclasses import dataclass

from models.minibatch_deviation import check_batch_size


@dataclass(frozen=True, kw_only=True)
class BatchSplit:
    """The split of every global batch of a run.

    All ranks run grad_accum_steps passes, because the engines' reductions are collectives. A rank with fewer
    micro-batches pads with passes of weight zero.
    """

    global_batch_size: int
    """Images per optimizer step, over all ranks."""
    world_size: int
    """Number of ranks."""
    group_size: int
    """Images that must stay on one rank and in one forward pass."""
    rank_batch_size: int
    """Largest number of images on one rank."""
    micro_batch_size: int
    """Largest number of images in one forward pass of one rank."""
    grad_accum_steps: int
    """Forward passes of each rank per optimizer step."""

    def share(self, rank: int) -> tuple[int, int]:
        """The range [start, stop) of the global batch for `rank`; the first ranks may get one group more."""
        num_groups, more = divmod(self.global_batch_size // self.group_size, self.world_size)
        first = rank * num_groups + min(rank, more)
        return first * self.group_size, (first + num_groups + (rank < more)) * self.group_size


def split_groups(
    global_batch_size: int, world_size: int, micro_batch_size: int | None, stddev_group_size: int
) -> BatchSplit:
    """The split for contiguous groups.

    Args:
        global_batch_size: images per step; a batch smaller than a group is one group.
        world_size: number of ranks.
        micro_batch_size: largest number of images in one forward pass; None: all images of the rank at once.
        stddev_group_size: images per group.

    Raises:
        ValueError: A group would be cut, or a rank would get no group; the message shows the arithmetic.
    """
    group_size = min(stddev_group_size, global_batch_size)
    num_groups, rest = divmod(global_batch_size, group_size)
    if rest:
        raise ValueError(
            f"training.global_batch_size ({global_batch_size}) must be a multiple of discriminator.stddev_group_size "
            f"({group_size}), so that no group of the minibatch deviation is cut: {global_batch_size} / {group_size} = "
            f"{global_batch_size / group_size:.4g} groups. Use {_near(global_batch_size, group_size)}"
        )
    if world_size > num_groups:
        raise ValueError(
            f"scaling.world_size ({world_size}) is larger than the number of minibatch deviation groups, and each rank "
            f"needs a whole one: training.global_batch_size {global_batch_size} / discriminator.stddev_group_size "
            f"{stddev_group_size} makes {num_groups}. Use a world size of at most {num_groups}, or a global batch of "
            f"at least {world_size * stddev_group_size}"
        )
    rank_batch_size = -(-num_groups // world_size) * group_size
    micro_batch_size = micro_batch_size or rank_batch_size
    if micro_batch_size % group_size:
        raise ValueError(
            f"training.micro_batch_size ({micro_batch_size}) must be a multiple of discriminator.stddev_group_size "
            f"({group_size}), so that no group of the minibatch deviation is cut. Use "
            f"{_near(micro_batch_size, group_size)}"
        )
    micro_batch_size = min(micro_batch_size, rank_batch_size)
    return BatchSplit(
        global_batch_size=global_batch_size,
        world_size=world_size,
        group_size=group_size,
        rank_batch_size=rank_batch_size,
        micro_batch_size=micro_batch_size,
        grad_accum_steps=-(-rank_batch_size // micro_batch_size),
    )


def split_evenly(
    global_batch_size: int, world_size: int, micro_batch_size: int | None, stddev_group_size: int
) -> BatchSplit:
    """The split for strided groups; same arguments as `split_groups`.

    Raises:
        ValueError: The sizes do not divide evenly; the message shows the arithmetic.
    """
    rank_batch_size, rest = divmod(global_batch_size, world_size)
    if rest:
        raise ValueError(
            f"training.global_batch_size ({global_batch_size}) must be a multiple of scaling.world_size "
            f"({world_size}) with discriminator.stddev_grouping strided: {global_batch_size} / {world_size} = "
            f"{global_batch_size / world_size:.4g} images each. Use {_near(global_batch_size, world_size)}, or "
            "stddev_grouping contiguous"
        )
    micro_batch_size = micro_batch_size or rank_batch_size
    grad_accum_steps, rest = divmod(rank_batch_size, micro_batch_size)
    if rest:
        possible = [n for n in range(1, rank_batch_size + 1) if rank_batch_size % n == 0]
        raise ValueError(
            f"training.micro_batch_size ({micro_batch_size}) must divide the {rank_batch_size} images of a rank with "
            f"discriminator.stddev_grouping strided: global batch {global_batch_size} = micro {micro_batch_size} x "
            f"accum {rank_batch_size / micro_batch_size:.4g} x world {world_size}. Use one of "
            f"{', '.join(map(str, possible))}"
        )
    try:
        check_batch_size(micro_batch_size, stddev_group_size)
    except ValueError as error:
        raise ValueError(
            f"training.micro_batch_size: global batch {global_batch_size} = micro {micro_batch_size} x accum "
            f"{grad_accum_steps} x world {world_size}, and {error}"
        ) from None
    return BatchSplit(
        global_batch_size=global_batch_size,
        world_size=world_size,
        group_size=micro_batch_size,
        rank_batch_size=rank_batch_size,
        micro_batch_size=micro_batch_size,
        grad_accum_steps=grad_accum_steps,
    )


def _near(size: int, unit: int) -> str:
    """The non-zero multiples of `unit` next to `size`, as text."""
    low = size // unit * unit
    return " or ".join(str(n) for n in (low, low + unit) if n)
