"""The loop's arithmetic: shares of a batch, when a run is over."""

import pytest
import torch

from tests.trainer.runs import Stopper, configure, state_of, train
from trainer.rank.loop import Share


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 4), (2, 8), (3, 4), (3, 8), (4, 4)])
def test_shares_of_all_ranks_tile_the_global_batch_in_whole_groups(tiny, tmp_path, world_size, micro_batch_size):
    sizes = (f"scaling.world_size={world_size}", f"training.micro_batch_size={micro_batch_size}")
    config = configure(tiny, tmp_path, *sizes)
    shares = [Share.of(config, rank, world_size) for rank in range(world_size)]
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(16))
    assert {(share.start % 4, share.stop % 4) for share in shares} == {(0, 0)}
    assert len({share.grad_accum_steps for share in shares}) == 1  # the reductions need all ranks
    assert {share.grad_accum_steps - share.num_micro_batches for share in shares} <= {0, 1}


def test_images_are_rounded_up_to_whole_steps(tiny, tmp_path):
    outcome, _ = train(configure(tiny, tmp_path, "training.total_images=33"))
    assert (outcome.finished, outcome.step, outcome.images) == (True, 3, 48)


def test_driver_hears_of_each_step(tiny, tmp_path):
    driver = Stopper()
    train(configure(tiny, tmp_path, "training.total_images=96"), driver)
    assert [(status.step, status.images, status.total_images) for status in driver.seen] == [
        (step, 16 * step, 96) for step in range(1, 7)
    ]
    assert driver.seen[2].losses == {}
    assert driver.seen[4].losses.keys() == {"loss_d_real", "loss_d_fake", "loss_g"}  # since the log point at 4
    assert driver.seen[4].images_per_s > 0


def test_bf16_run_keeps_its_state_in_float32(tiny, tmp_path):
    outcome, recorder = train(configure(tiny, tmp_path, "training.precision=bf16", "training.total_images=64"))
    assert outcome.finished
    assert 0 < recorder.metrics[4]["loss_g"] < 10
    assert {tensor.dtype for tensor in state_of(tmp_path, 4).values()} == {torch.float32}
