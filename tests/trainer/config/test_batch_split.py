"""A global batch is spread in whole groups, as evenly as they can be shared, or refused with the arithmetic."""

import dataclasses

import pytest

from trainer.config.batch_split import split_evenly, split_groups


def test_global_batch_is_micro_times_accum_times_world():
    assert dataclasses.astuple(split_groups(64, 2, 8, 4)) == (64, 2, 4, 32, 8, 4)


def test_without_micro_batch_a_rank_takes_its_images_at_once():
    split = split_groups(64, 4, None, 4)
    assert (split.micro_batch_size, split.grad_accum_steps) == (16, 1)


@pytest.mark.parametrize("world_size", range(1, 17))
@pytest.mark.parametrize("micro_batch_size", [None, 4, 12, 400])
def test_any_number_of_ranks_up_to_that_of_groups_takes_whole_groups(world_size: int, micro_batch_size: int | None):
    split = split_groups(64, world_size, micro_batch_size, 4)
    shares = [split.share(rank) for rank in range(world_size)]
    assert [i for start, stop in shares for i in range(start, stop)] == list(range(64))
    sizes = [stop - start for start, stop in shares]
    assert all(size % 4 == 0 for size in sizes)
    assert max(sizes) - min(sizes) <= 4
    assert max(sizes) == split.rank_batch_size
    passes = [-(-size // split.micro_batch_size) for size in sizes]
    assert max(passes) == split.grad_accum_steps
    assert min(passes) >= split.grad_accum_steps - 1  # at most one pass without images of its own


def test_a_micro_batch_need_not_divide_the_images_of_a_rank():
    split = split_groups(64, 2, 24, 4)
    assert (split.rank_batch_size, split.micro_batch_size, split.grad_accum_steps) == (32, 24, 2)


def test_a_batch_smaller_than_a_group_is_one_group():
    assert dataclasses.astuple(split_groups(3, 1, None, 4)) == (3, 1, 3, 3, 3, 1)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            (250, 4, None, 4),
            "training.global_batch_size (250) must be a multiple of discriminator.stddev_group_size (4), so that no "
            "group of the minibatch deviation is cut: 250 / 4 = 62.5 groups. Use 248 or 252",
        ),
        (
            (64, 20, None, 4),
            "scaling.world_size (20) is larger than the number of minibatch deviation groups, and each rank needs a "
            "whole one: training.global_batch_size 64 / discriminator.stddev_group_size 4 makes 16. Use a world size "
            "of at most 16, or a global batch of at least 80",
        ),
        (
            (3, 2, None, 4),
            "scaling.world_size (2) is larger than the number of minibatch deviation groups, and each rank needs a "
            "whole one: training.global_batch_size 3 / discriminator.stddev_group_size 4 makes 1. Use a world size of "
            "at most 1, or a global batch of at least 8",
        ),
        (
            (12, 1, 6, 4),
            "training.micro_batch_size (6) must be a multiple of discriminator.stddev_group_size (4), so that no group "
            "of the minibatch deviation is cut. Use 4 or 8",
        ),
        (
            (12, 1, 2, 4),
            "training.micro_batch_size (2) must be a multiple of discriminator.stddev_group_size (4), so that no group "
            "of the minibatch deviation is cut. Use 4",
        ),
    ],
)
def test_what_would_cut_a_group_is_refused(sizes: tuple[int, int, int | None, int], words: str):
    with pytest.raises(ValueError) as caught:
        split_groups(*sizes)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            (250, 4, None, 4),
            "training.global_batch_size (250) must be a multiple of scaling.world_size (4) with "
            "discriminator.stddev_grouping strided: 250 / 4 = 62.5 images each. Use 248 or 252, or stddev_grouping "
            "contiguous",
        ),
        (
            (64, 2, 24, 4),
            "training.micro_batch_size (24) must divide the 32 images of a rank with discriminator.stddev_grouping "
            "strided: global batch 64 = micro 24 x accum 1.333 x world 2. Use one of 1, 2, 4, 8, 16, 32",
        ),
        (
            (12, 1, 6, 4),
            "training.micro_batch_size: global batch 12 = micro 6 x accum 2 x world 1, and a batch of 6 images cannot "
            "be split into groups of stddev_group_size 4: the number of images in one forward pass must be a "
            "multiple of 4, or smaller. Change the micro batch size or discriminator.stddev_group_size",
        ),
    ],
)
def test_strided_groups_need_equal_shares(sizes: tuple[int, int, int | None, int], words: str):
    with pytest.raises(ValueError) as caught:
        split_evenly(*sizes)
    assert str(caught.value) == words


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_a_strided_micro_batch_below_the_group_is_one_group(micro_batch_size: int):
    split = split_evenly(6, 1, micro_batch_size, 4)
    assert (split.micro_batch_size, split.grad_accum_steps) == (micro_batch_size, 6 // micro_batch_size)
    assert split.share(0) == (0, 6)
