import dataclasses

import pytest
import torch

from models.shapes import ImageForm
from trainer.config.io import load_config
from trainer.plan.cost import Costs, count_costs

PLAIN = ("training.objective=non_saturating",)
"""An objective that needs no penalty."""


@pytest.fixture(scope="module")
def cifar10() -> Costs:
    return count_costs(load_config("cifar10"))


@pytest.fixture(scope="module")
def lsun256() -> Costs:
    return count_costs(load_config("lsun256"))


@pytest.mark.slow
def test_parameters_are_those_of_the_reference(cifar10, lsun256):
    assert round(cifar10.parameters_g / 1e6, 2) == 48.43
    assert round(cifar10.parameters_d / 1e6, 2) == 12.74
    assert round(lsun256.parameters_g / 1e6, 2) == 39.73
    assert round(lsun256.parameters_d / 1e6, 2) == 27.74


def test_forward_flops_are_those_of_the_reference(cifar10, lsun256):
    # 1 %: the reference filters resampled images in another, slightly dearer way.
    assert cifar10.forward_g == pytest.approx(14.1e9, rel=0.01)
    assert cifar10.forward_d == pytest.approx(2.97e9, rel=0.01)
    assert lsun256.forward_g == pytest.approx(141.7e9, rel=0.01)
    assert lsun256.forward_d == pytest.approx(152.5e9, rel=0.01)


@pytest.mark.parametrize("name", ["cifar10", "lsun256"])
def test_an_iteration_costs_four_forwards_of_g_and_eight_of_d_and_r1_three_more(name, request):
    costs: Costs = request.getfixturevalue(name)
    # D's update: one forward of G without backward; real and fake forward (2), their backward twice as much (4).
    assert costs.update_d.flops_per_image == pytest.approx(costs.forward_g + 6 * costs.forward_d, rel=0.005)
    # G's update: forward and backward of G (3); forward of D (1) and the gradient of its input alone (1).
    assert costs.update_g.flops_per_image == pytest.approx(3 * costs.forward_g + 2 * costs.forward_d, rel=0.005)
    # R1: the gradient of the input (1), and through it to its own input and to the weights (2).
    assert costs.penalty_flops_per_image == pytest.approx(3 * costs.forward_d, rel=0.005)


def test_r1_counts_at_its_interval(cifar10):
    every, lazy, never = (
        dataclasses.replace(cifar10, penalty_interval_steps=interval).flops_per_image for interval in (1, 10, None)
    )
    assert every - never == pytest.approx(cifar10.penalty_flops_per_image)
    assert lazy - never == pytest.approx(cifar10.penalty_flops_per_image / 10)


@pytest.mark.slow
def test_r2_alone_counts_as_r1_does():
    r1, r2, none = (
        count_costs(load_config("digits", [*PLAIN, f"training.r1_gamma={r1}", f"training.r2_gamma={r2}"]))
        for r1, r2 in ((0.1, 0), (0, 0.1), (0, 0))
    )
    assert r1.flops_per_image == pytest.approx(r2.flops_per_image, rel=0.01)
    # Three forward passes of D, as above, at one step in four.
    assert r2.flops_per_image - none.flops_per_image == pytest.approx(3 * none.forward_d / 4, rel=0.02)
    assert (r2.penalty_interval_steps, none.penalty_interval_steps) == (4, None)


@pytest.mark.slow
def test_saved_bytes_grow_with_the_micro_batch_and_flops_of_an_image_do_not():
    small, large = (count_costs(load_config("digits", [f"training.micro_batch_size={micro}"])) for micro in (4, 16))
    assert large.update_g.saved_bytes == pytest.approx(4 * small.update_g.saved_bytes, rel=0.01)
    assert large.update_d_penalized.saved_bytes > large.update_d.saved_bytes
    assert large.update_g.flops_per_image == small.update_g.flops_per_image


@pytest.mark.slow
def test_bf16_saves_less_but_keeps_the_norms_and_the_real_half_of_r1_in_float32():
    fp32, bf16 = (
        count_costs(load_config("digits", ["training.r2_gamma=0", f"training.precision={p}"])) for p in ("fp32", "bf16")
    )
    # Autocast on a GPU computes group norm in float32, and with it the activations that follow.
    assert fp32.update_g.saved_bytes / 2 < bf16.update_g.saved_bytes < fp32.update_g.saved_bytes
    # The discriminator has no norm. Its minibatch deviation is in float32, and its weights are kept in bf16 as well.
    assert fp32.update_d.saved_bytes / 2 < bf16.update_d.saved_bytes < 0.65 * fp32.update_d.saved_bytes
    assert (
        fp32.update_d_penalized.saved_bytes / 2
        < bf16.update_d_penalized.saved_bytes
        < fp32.update_d_penalized.saved_bytes
    )
    assert bf16.update_g.flops_per_image == fp32.update_g.flops_per_image


@pytest.mark.slow
def test_auto_counts_as_bf16_for_a_gpu_and_as_fp32_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    saved = {
        (precision, device): count_costs(
            load_config("digits", [f"training.precision={precision}", f"scaling.device={device}"])
        ).update_g.saved_bytes
        for precision, device in (("auto", "gpu"), ("bf16", "gpu"), ("auto", "cpu"), ("fp32", "cpu"))
    }
    assert saved["auto", "gpu"] == saved["bf16", "gpu"] < saved["auto", "cpu"] == saved["fp32", "cpu"]


@pytest.mark.slow
def test_saved_bytes_are_what_autograd_holds_on_the_cpu():
    """The count on the meta device against a real forward pass of the same generator."""
    from models.generator import Generator

    config = load_config("digits", ["training.micro_batch_size=4"])
    generator = Generator(config.generator, ImageForm(16, 1))
    known = {t.untyped_storage().data_ptr() for t in (*generator.parameters(), *generator.buffers())}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = generator(torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.int64), torch.randn(4, 32))
    real = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    del out
    counted = count_costs(config).update_g.saved_bytes
    # G's update also saves what D holds for the gradient of its input.
    assert real < counted < 2 * real


@pytest.mark.slow
def test_augmentation_costs_no_flops_and_is_counted_on_any_config():
    for more in ((), ("training.penalty=finite_difference", "training.penalty_share=0.5")):
        plain, augmented = (
            count_costs(load_config("digits", [*more, f"training.augmentation.probability={p}"])) for p in (0, 0.5)
        )
        assert augmented.flops_per_image == plain.flops_per_image
        assert plain.update_d.saved_bytes <= augmented.update_d.saved_bytes < 1.02 * plain.update_d.saved_bytes


@pytest.mark.slow
def test_recomputed_blocks_save_less_and_cost_one_forward_pass_more():
    sets = ("training.penalty=finite_difference", "training.precision=bf16")
    kept, recomputed = (
        count_costs(load_config("digits", [*sets, f"engine.checkpoint_activations={on}"])) for on in ("false", "true")
    )
    for update in ("update_g", "update_d", "update_d_penalized"):
        before, after = getattr(kept, update), getattr(recomputed, update)
        assert after.saved_bytes < 0.5 * before.saved_bytes
        assert 1.1 * before.flops_per_image < after.flops_per_image < 4 / 3 * before.flops_per_image


@pytest.mark.slow
def test_grouped_convolutions_count_as_what_they_are():
    """Backward twice the forward pass, as with all others; torch counts each group's weights for every group."""
    sets = ("discriminator.kind=resnext", "training.r1_gamma=0", "training.r2_gamma=0", *PLAIN)
    costs = count_costs(load_config("digits", sets))
    passes = (costs.update_d.flops_per_image - costs.forward_g) / costs.forward_d
    assert passes == pytest.approx(6, rel=0.01)


def test_counting_draws_no_random_number():
    state = torch.get_rng_state()
    count_costs(load_config("digits"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_what_d_predicts_is_counted_in_its_update_and_for_afd_in_that_of_g():
    sets = ("discriminator.sees=marginal", "training.r1_gamma=0", "training.r2_gamma=0", *PLAIN)
    predicts = "discriminator.predicts=[{}]".format
    plain, denoising, afd, both = (
        count_costs(load_config("digits", [*sets, *more]))
        for more in (
            (),
            ("training.denoising=1", predicts("x0")),
            ("training.afd=1", predicts("x_t")),
            ("training.denoising=1", "training.afd=1", predicts("x0, x_t")),
        )
    )
    assert plain.forward_d == denoising.forward_d == afd.forward_d
    decoder = (denoising.update_d.flops_per_image - plain.update_d.flops_per_image) / 3
    assert 0.3 * plain.forward_d < decoder < 0.6 * plain.forward_d
    assert denoising.update_g == plain.update_g
    # Forward and backward of the decoder for one side, and for both; in G's update only the gradient of its input.
    assert afd.update_d.flops_per_image == denoising.update_d.flops_per_image
    assert both.update_d.flops_per_image - plain.update_d.flops_per_image == pytest.approx(6 * decoder, rel=0.02)
    assert afd.update_g.flops_per_image - plain.update_g.flops_per_image == pytest.approx(2 * decoder, rel=0.02)
    normalized = count_costs(
        load_config("digits", [*sets, "training.afd=1", predicts("x_t"), "training.gradient_normalization=true"])
    )
    # D judges and predicts in passes of their own.
    more = normalized.update_g.flops_per_image - afd.update_g.flops_per_image
    assert more == pytest.approx(2 * plain.forward_d, rel=0.02)
    assert plain.parameters_d < denoising.parameters_d == afd.parameters_d < both.parameters_d
    assert plain.update_d.saved_bytes < denoising.update_d.saved_bytes < both.update_d.saved_bytes
