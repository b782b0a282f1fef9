from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.discriminator import Discriminator, DiscriminatorConfig, check_image_size
from models.generator import GeneratorConfig
from models.layers import NEAR_ZERO
from models.networks.build import build_discriminator, build_generator, shared_with_encoder
from models.published.state_dict import discriminator_from
from models.shapes import ImageForm

FORM = ImageForm(32, 3)
TINY = DiscriminatorConfig(base_channels=2, time_embedding_dim=4, stddev_group_size=2)


def inputs(B: int, image_size: int = 8, image_channels: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    x_tm1, x_t = torch.randn(2, B, image_channels, image_size, image_size).unbind()
    return x_tm1, x_t, torch.arange(B) % 4


def awakened(discriminator: Discriminator) -> Discriminator:
    """Replace the initial weights, of which many are as good as zero."""
    torch.manual_seed(1)
    for parameter in discriminator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return discriminator


def r1_of(logits: Tensor, x_tm1: Tensor) -> Tensor:
    """Mean squared norm of the gradient, itself differentiable."""
    (gradient,) = torch.autograd.grad(logits.sum(), x_tm1, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


@pytest.mark.parametrize("kind", ["small", "large"])
def test_logits_and_r1_equal_the_published_discriminator(golden, kind: str) -> None:
    settings, state, arrays = golden(f"discriminator_{kind}")
    discriminator = discriminator_from(settings, state)
    x_tm1 = arrays["x_tm1"].requires_grad_()
    logits = discriminator(x_tm1, arrays["x_t"], arrays["t"])
    # measured 3e-7; the reference page grants 1e-4
    torch.testing.assert_close(logits, arrays["logits"], atol=2e-6, rtol=0)
    # measured 4e-7 relative; the reference page grants 1e-4
    assert r1_of(logits, x_tm1).item() == pytest.approx(arrays["r1_unweighted"].item(), rel=5e-6)


def test_r1_gradient_reaches_every_layer_and_equals_its_finite_difference() -> None:
    discriminator = awakened(Discriminator(TINY, ImageForm(8, 1))).double()
    x_tm1, x_t, t = inputs(B=4)
    x_tm1, x_t = x_tm1.double().requires_grad_(), x_t.double()

    def r1() -> Tensor:
        return r1_of(discriminator(x_tm1, x_t, t), x_tm1)

    parameters = dict(discriminator.named_parameters())
    gradients = torch.autograd.grad(r1(), list(parameters.values()), allow_unused=True)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            parameter.data += sign * 1e-6 * direction
            values.append(r1().item())
            parameter.data -= sign * 1e-6 * direction
        expected = (values[0] - values[1]) / 2e-6
        got = 0.0 if gradient is None else (gradient * direction).sum().item()
        # steps of 1e-6 in float64 leave about 1e-9 of the value, which is of the order 1
        assert got == pytest.approx(expected, rel=1e-5, abs=1e-7), name
    # Only the very last bias cannot change a gradient.
    assert [name for name, g in zip(parameters, gradients, strict=True) if g is None] == ["head.bias"]


def test_contiguous_groups_make_logits_independent_of_the_world_size() -> None:
    discriminator = awakened(Discriminator(TINY, ImageForm(8, 1)))
    x_tm1, x_t, t = inputs(B=8)
    whole = discriminator(x_tm1, x_t, t)
    for rank_share in (2, 4):
        parts = zip(x_tm1.split(rank_share), x_t.split(rank_share), t.split(rank_share), strict=True)
        shared = torch.cat([discriminator(*part) for part in parts])
        # the order of float32 sums may depend on the batch
        torch.testing.assert_close(shared, whole, atol=1e-5, rtol=1e-5)


def test_strided_groups_follow_the_batch() -> None:
    config = DiscriminatorConfig(base_channels=2, time_embedding_dim=4, stddev_group_size=2, stddev_grouping="strided")
    strided = awakened(Discriminator(config, ImageForm(8, 1)))
    contiguous = awakened(Discriminator(TINY, ImageForm(8, 1)))
    x_tm1, x_t, t = inputs(B=4)
    order = torch.tensor([0, 2, 1, 3])
    torch.testing.assert_close(
        strided(x_tm1, x_t, t)[order], contiguous(x_tm1[order], x_t[order], t[order]), atol=1e-5, rtol=1e-5
    )


def test_arguments_are_the_cleaner_image_then_the_noisier_one() -> None:
    discriminator = awakened(Discriminator(TINY, ImageForm(8, 1)))
    with torch.no_grad():
        discriminator.conv_in.weight[:, 1:] = 0  # blind to the second argument
    x_tm1, x_t, t = inputs(B=2)
    assert torch.equal(discriminator(x_tm1, x_t, t), discriminator(x_tm1, -x_t, t))
    assert not torch.equal(discriminator(x_tm1, x_t, t), discriminator(-x_tm1, x_t, t))


def test_one_that_sees_the_marginal_has_half_the_input_and_is_blind_to_the_noisier_image() -> None:
    discriminator = awakened(Discriminator(replace(TINY, sees="marginal"), ImageForm(8, 1)))
    assert discriminator.conv_in.weight.shape[1] == 1
    x_tm1, x_t, t = inputs(B=2)
    assert torch.equal(discriminator(x_tm1, x_t, t), discriminator(x_tm1, -x_t, t))
    assert not torch.equal(discriminator(x_tm1, x_t, t), discriminator(-x_tm1, x_t, t))


def test_initial_scales() -> None:
    small = Discriminator(DiscriminatorConfig(base_channels=4), ImageForm(8, 3))
    large = Discriminator(DiscriminatorConfig(base_channels=4, kind="large"), ImageForm(8, 3))
    near_zero = (3 * NEAR_ZERO / (9 * 32)) ** 0.5
    assert small.conv_out.weight.abs().max().item() <= near_zero
    assert (3 / (9 * 32)) ** 0.5 * 0.9 < large.conv_out.weight.abs().max().item() <= (3 / (9 * 32)) ** 0.5
    for name, parameter in small.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        if name.endswith("conv2.weight"):
            assert parameter.abs().max().item() <= (3 * NEAR_ZERO / (9 * parameter.shape[0])) ** 0.5


def test_channels_last_gives_the_same_logits() -> None:
    discriminator = awakened(Discriminator(TINY, ImageForm(8, 3)))
    x_tm1, x_t, t = inputs(B=4, image_channels=3)
    expected = discriminator(x_tm1, x_t, t)
    discriminator.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    last = [x.contiguous(memory_format=torch.channels_last) for x in (x_tm1, x_t)]
    # another float32 order of summation
    torch.testing.assert_close(discriminator(*last, t), expected, atol=1e-5, rtol=1e-5)


def test_runs_under_bfloat16_autocast() -> None:
    discriminator = awakened(Discriminator(TINY, ImageForm(8, 1)))
    x_tm1, x_t, t = inputs(B=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = discriminator(x_tm1, x_t, t)
    expected = discriminator(x_tm1, x_t, t)
    # 8 bits of mantissa through about 20 layers
    torch.testing.assert_close(logits.float(), expected, atol=0.1 * expected.abs().max().item(), rtol=0)
    logits.float().sum().backward()


@pytest.mark.parametrize(
    ("kind", "image_size", "num_parameters", "flops"),
    [("small", 32, 12.74e6, 2.97e9), ("large", 256, 27.74e6, 152.5e9)],
)
def test_size_and_work_are_the_published_ones(kind, image_size: int, num_parameters: float, flops: float) -> None:
    with torch.device("meta"):
        discriminator = Discriminator(DiscriminatorConfig(kind=kind), ImageForm(image_size, 3))
        x_tm1, x_t, t = inputs(B=1, image_size=image_size, image_channels=3)
    assert round(sum(p.numel() for p in discriminator.parameters()) / 1e4) == round(num_parameters / 1e4)
    with FlopCounterMode(display=False) as counter:
        discriminator(x_tm1, x_t, t)
    # The published figures run the FIR filters at full resolution before they drop pixels: up to 0.7% more.
    assert counter.get_total_flops() == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize(("kind", "image_size", "factor"), [("small", 28, 8), ("small", 4, 8), ("large", 32, 64)])
def test_image_that_cannot_be_halved_often_enough_is_refused(kind, image_size: int, factor: int) -> None:
    with pytest.raises(ValueError, match=rf"image_size is {image_size}.*{kind}.*multiple of {factor}.*small, large"):
        check_image_size(DiscriminatorConfig(kind=kind), image_size)


def test_indivisible_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 3 images"):
        Discriminator(TINY, ImageForm(8, 1))(*inputs(B=3))


def networks(base: int, *multipliers: int, of_d: int) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        generator = build_generator(GeneratorConfig(base_channels=base, channel_multipliers=multipliers), FORM)
        return build_discriminator(DiscriminatorConfig(base_channels=of_d), FORM), generator


def twins(shared: dict[str, str]) -> set[tuple[str, str]]:
    return {(own.rpartition(".conv")[0], twin.rpartition(".conv")[0]) for own, twin in shared.items() if ".conv" in own}


def test_blocks_are_matched_in_their_order_by_the_shape_of_their_convolutions():
    discriminator, generator = networks(16, 1, 2, of_d=8)  # D: 16 to 16, 32, 64, 64; G: 16 to 16 thrice, 32 often
    shared = shared_with_encoder(discriminator, generator)
    assert twins(shared) == {("blocks.0", "down.0.blocks.0"), ("blocks.1", "down.1.blocks.0")}
    # The first has no convolution in the generator's shortcut; none of the embedding of the step is taken.
    assert [name for name in shared if "shortcut" in name] == ["blocks.1.shortcut.weight"]
    assert not [name for name in shared if "time" in name]
    own, theirs = dict(discriminator.named_parameters()), dict(generator.named_parameters())
    assert len(shared) == 9 and all(own[name].shape == theirs[twin].shape for name, twin in shared.items())


def test_a_block_of_the_encoder_is_taken_once_and_the_decoder_never():
    discriminator, generator = networks(16, 1, 1, of_d=2)  # D ends with 16 to 16
    assert twins(shared_with_encoder(discriminator, generator)) == {("blocks.3", "down.0.blocks.0")}
    generator.down = nn.ModuleList()
    assert twins(shared_with_encoder(discriminator, generator)) == {("blocks.3", "middle_block1")}
    del generator.middle_block1, generator.middle_block2
    assert not shared_with_encoder(discriminator, generator)


PREDICTS = replace(TINY, predicts=("x0", "x_t"))


def test_one_that_predicts_judges_as_one_that_does_not() -> None:
    plain, predicting = (
        torch.manual_seed(2) and Discriminator(config, ImageForm(8, 3, 5)) for config in (TINY, PREDICTS)
    )
    own, others = plain.state_dict(), predicting.state_dict()
    assert {name for name in others if name not in own} == {name for name in others if name.startswith("decoder.")}
    assert all(torch.equal(others[name], value) for name, value in own.items())
    x_tm1, x_t, t = inputs(B=4, image_channels=3)
    logits, predictions = predicting(x_tm1, x_t, t, t, predicting=True)
    assert torch.equal(logits, plain(x_tm1, x_t, t, t)) and torch.equal(logits, predicting(x_tm1, x_t, t, t))
    assert [x.shape for x in predictions] == 2 * [(4, 3, 8, 8)]
    assert all(x.abs().max() < 1e-4 * x_tm1.abs().max() for x in predictions)  # they start near zero


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_predictions_reach_the_trunk_and_all_of_the_decoder_but_not_the_head(
    memory_format: torch.memory_format,
) -> None:
    network = awakened(Discriminator(PREDICTS, ImageForm(8, 3)))
    network.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    x_tm1, x_t, t = inputs(B=4, image_channels=3)
    _, predictions = network(*(x.contiguous(memory_format=memory_format) for x in (x_tm1, x_t)), t, predicting=True)
    torch.stack([x.square().sum() for x in predictions]).sum().backward()
    without = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {"conv_out", "head"}


def test_predictions_of_an_image_do_not_depend_on_its_group() -> None:
    network = awakened(Discriminator(PREDICTS, ImageForm(8, 3)))
    x_tm1, x_t, t = inputs(B=4, image_channels=3)
    _, predictions = network(x_tm1, x_t, t, predicting=True)
    _, again = network(x_tm1.flip(0), x_t.flip(0), t.flip(0), predicting=True)
    for a, b in zip(again, predictions, strict=True):
        torch.testing.assert_close(a.flip(0), b, atol=1e-5, rtol=1e-5)  # another float32 order of summation


def test_the_decoder_costs_two_fifths_of_a_judgement() -> None:
    config = DiscriminatorConfig(predicts=("x0", "x_t"))
    with torch.device("meta"):
        discriminator, (x_tm1, x_t, t) = Discriminator(config, FORM), inputs(B=1, image_size=32, image_channels=3)
    flops = []
    for predicting in (False, True):
        with FlopCounterMode(display=False) as counter:
            discriminator(x_tm1, x_t, t, predicting=predicting)
        flops.append(counter.get_total_flops())
    assert flops[1] / flops[0] == pytest.approx(1.44, abs=0.005)
