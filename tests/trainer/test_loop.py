"""The loop's arithmetic: shares of a batch, images on the device, when a run is over."""

import torch

from tests.trainer.test_worker import Stopper, configure, state_of, train
from trainer.loop import Share, to_device
from trainer.randomness import Draws


def draws(count: int) -> Draws:
    return Draws(seed=1, step=2, samples=torch.arange(count))


def test_shares_of_all_ranks_tile_the_global_batch(tiny, tmp_path):
    for world_size in (1, 2, 4):
        config = configure(tiny, tmp_path, f"scaling.world_size={world_size}", "training.micro_batch_size=4")
        shares = [Share.of(config, rank, world_size) for rank in range(world_size)]
        assert [i for share in shares for i in range(share.start, share.stop)] == list(range(16))
        assert all(share.grad_accum_steps * 4 * world_size == 16 for share in shares)


def test_levels_become_minus_one_to_one():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    x0 = to_device(images, draws(1), flip=False)
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


def test_flips_mirror_whole_images_by_their_own_coins():
    images = torch.randint(0, 256, (64, 3, 4, 5), dtype=torch.uint8)
    plain, flipped = to_device(images, draws(64), flip=False), to_device(images, draws(64), flip=True)
    coins = draws(64).flips()
    assert 0 < int(coins.sum()) < 64
    for i, coin in enumerate(coins.tolist()):
        assert torch.equal(flipped[i], plain[i].flip(-1) if coin else plain[i])


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
