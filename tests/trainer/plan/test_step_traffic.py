"""What a step of cifar10 moves, with the figures of docs/benchmarks.md."""

import pytest
import torch

from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig
from trainer.plan import cuda_autocast
from trainer.plan.bytes_moved import Kind, Traffic
from trainer.plan.cost import count_costs
from trainer.plan.step_traffic import StepTraffic, count_generator, count_step

# Counts are exact and equal on every machine; the tolerance is the rounding of the figures to 0.1 GB.
ROUNDING = 0.05


def gb(traffic: Traffic, *kinds: Kind) -> float:
    return sum(traffic[kind].total for kind in kinds or traffic) / 1e9


def cifar10(*more: str) -> TrainConfig:
    return load_config("cifar10", ["scaling.world_size=1", *more])


@pytest.mark.slow
def test_generator_of_cifar10_moves_143_gb_forward_and_backward_in_bf16_and_its_convolutions_15():
    counted = count_generator(cifar10(), bf16=True)
    assert gb(counted) == pytest.approx(143.0, abs=ROUNDING)
    assert gb(counted, "convolution", "fir") == pytest.approx(15.0, abs=ROUNDING)


@pytest.mark.slow
def test_generator_of_cifar10_would_move_78_gb_if_autocast_left_its_norms_in_bf16(monkeypatch):
    monkeypatch.setattr(cuda_autocast, "IN_FP32", cuda_autocast.IN_FP32 - {"group_norm"})
    assert gb(count_generator(cifar10(), bf16=True)) == pytest.approx(77.4, abs=ROUNDING)


def test_with_fused_operators_the_generator_of_cifar10_moves_35_gb_in_bf16():
    counted = count_generator(cifar10(), bf16=True, fuses=True)
    assert gb(counted) == pytest.approx(34.9, abs=ROUNDING)
    assert gb(counted, "convolution") == pytest.approx(12.7, abs=ROUNDING)
    assert gb(counted, "fused") == pytest.approx(15.0, abs=ROUNDING)
    assert gb(counted, "norm", "fir") == 0


def test_with_fused_operators_a_step_of_cifar10_moves_76_gb_in_bf16():
    counted = count_step(cifar10(), bf16=True, fuses=True)
    found = [gb(part) for part in (counted.update_d, counted.update_g, counted.penalties, counted.whole)]
    assert found == pytest.approx([29.9, 44.2, 26.9, 75.9], abs=ROUNDING)
    assert gb(counted.generator) == pytest.approx(34.9, abs=ROUNDING)
    assert gb(counted.whole, "norm", "fir") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bf16", "update_d", "update_g", "penalties", "step"),
    [(True, 68.7, 153.1, 29.4, 223.7), (False, 87.8, 169.9, 21.6, 259.2)],
)
def test_step_of_cifar10_moves_224_gb_in_bf16_and_259_in_fp32(bf16, update_d, update_g, penalties, step):
    counted = count_step(cifar10(), bf16=bf16)
    found = [gb(part) for part in (counted.update_d, counted.update_g, counted.penalties, counted.whole)]
    assert found == pytest.approx([update_d, update_g, penalties, step], abs=ROUNDING)
    assert counted.penalty_share == 1 / 15


def digits(*more: str) -> StepTraffic:
    return count_step(load_config("digits", ["scaling.world_size=1", *more]), bf16=False)


@pytest.fixture(scope="module")
def whole_batch() -> StepTraffic:
    return digits()


@pytest.mark.slow
def test_flops_are_those_of_the_costs(whole_batch):
    config = load_config("digits", ["scaling.world_size=1"])
    costs, batch = count_costs(config), config.training.global_batch_size
    for update, flops in ((whole_batch.update_d, costs.update_d), (whole_batch.update_g, costs.update_g)):
        assert sum(moved.flops[torch.float32] for moved in update.values()) / batch == flops.flops_per_image


@pytest.mark.slow
def test_optimizer_reads_four_tensors_of_each_parameter_and_the_guard_one_and_writes_three(whole_batch):
    costs = count_costs(load_config("digits"))
    for update, parameters in ((whole_batch.update_d, costs.parameters_d), (whole_batch.update_g, costs.parameters_g)):
        assert update["optimizer"].total == pytest.approx((4 + 3 + 1) * 4 * parameters, rel=0.01)  # and scalars
    assert whole_batch.update_g["average"].total == 3 * 4 * costs.parameters_g
    assert whole_batch.update_d["average"].total == 0


@pytest.mark.slow
def test_two_passes_move_what_depends_on_weights_twice_and_update_them_once(whole_batch):
    passes = digits(f"training.micro_batch_size={load_config('digits').training.global_batch_size // 2}")
    assert passes.update_g["optimizer"].total == whole_batch.update_g["optimizer"].total
    assert passes.update_g["average"].total == whole_batch.update_g["average"].total
    assert passes.update_g["activation"].total == whole_batch.update_g["activation"].total
    assert passes.update_g["convolution"].total > whole_batch.update_g["convolution"].total


def test_without_a_discriminator_only_the_generator_is_counted():
    counted = digits("training.objective=gaussian", "training.r1_gamma=0")
    assert counted.update_d == {}
    assert counted.penalties == {}
    assert gb(counted.whole) == gb(counted.update_g)


@pytest.mark.slow
def test_augmentation_moves_images_and_computes_no_product(whole_batch):
    augmented = digits("training.augmentation.probability=0.5")
    for name in ("update_d", "update_g"):
        plain, more = getattr(whole_batch, name), getattr(augmented, name)
        assert more["convolution"] == plain["convolution"]
        assert 0 < gb(more) - gb(plain) < 0.1 * gb(plain)
