from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.generator import Generator, GeneratorConfig
from models.layers import NEAR_ZERO
from models.published.state_dict import generator_from
from models.shapes import ImageForm

TINY = GeneratorConfig(
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    latent_dim=6,
    latent_embedding_dim=12,
    num_mapping_layers=1,
)
CIFAR10 = GeneratorConfig(num_mapping_layers=4)
LSUN256 = GeneratorConfig(base_channels=64, channel_multipliers=(1, 1, 2, 2, 4, 4))

VARIANTS = {
    "default": TINY,
    "one_level": replace(TINY, channel_multipliers=(1,), attention_resolutions=(8,)),
    "four_levels": replace(TINY, channel_multipliers=(1, 1, 2, 3), attention_resolutions=(8, 2)),
    "no_attention": replace(TINY, attention_resolutions=()),
    "dropout": replace(TINY, dropout=0.1),
    "nearest": replace(TINY, resample="nearest"),
    "no_rescale_no_tanh": replace(TINY, skip_rescale=False, output_tanh=False),
    "oneadagn": replace(TINY, block_type="biggan_oneadagn"),
    "output_skip": replace(TINY, progressive_output="output_skip", channel_multipliers=(1, 2, 2)),
    "no_input": replace(TINY, progressive_input="none"),
    "input_skip_sum": replace(TINY, progressive_input="input_skip"),
    "input_skip_cat": replace(TINY, progressive_input="input_skip", progressive_combine="cat"),
    "input_skip_cat_nearest": replace(
        TINY,
        progressive_input="input_skip",
        progressive_combine="cat",
        resample="nearest",
        channel_multipliers=(1, 1, 2),
    ),
    "fourier": replace(TINY, time_embedding="fourier"),
}


def inputs(config: GeneratorConfig, image_size: int, image_channels: int, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    x_t = torch.randn(B, image_channels, image_size, image_size)
    return x_t, torch.randint(4, (B,)), torch.randn(B, config.latent_dim)


def awakened(generator: Generator) -> Generator:
    """Replace the initial weights, of which many are as good as zero."""
    torch.manual_seed(1)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return generator


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["biggan_residual", "nofir_notanh", "oneadagn_inputskip_outputskip"])
def test_outputs_equal_the_published_generator(golden, name: str, memory_format: torch.memory_format) -> None:
    settings, state, arrays = golden(f"generator_{name}")
    generator = generator_from(settings, state)
    generator.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    x_t = arrays["x_t"].contiguous(memory_format=memory_format)
    # measured 8e-7; the reference page grants 1e-4
    torch.testing.assert_close(generator(x_t, arrays["t"], arrays["z"]), arrays["out"], atol=5e-6, rtol=0)


@pytest.mark.parametrize("image_channels", [1, 3])
@pytest.mark.parametrize("image_size", [8, 16])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_uses_every_parameter(name: str, image_size: int, image_channels: int) -> None:
    config = VARIANTS[name]
    if image_size == 16:
        config = replace(config, attention_resolutions=tuple(2 * side for side in config.attention_resolutions))
    generator = awakened(Generator(config, ImageForm(image_size, image_channels)))
    x_t, t, z = inputs(config, image_size, image_channels)
    x0_pred = generator(x_t, t, z)
    assert x0_pred.shape == x_t.shape
    assert not config.output_tanh or x0_pred.abs().max() <= 1
    x0_pred.square().sum().backward()
    assert [name for name, parameter in generator.named_parameters() if parameter.grad is None] == []


def test_parameter_names_say_where_they_are() -> None:
    names = dict(Generator(TINY, ImageForm(8, 1)).named_parameters())
    for name in (
        "conv_in.weight",
        "time_embedding.linear1.weight",
        "mapping.layers.0.weight",
        "down.0.blocks.0.conv1.weight",
        "down.0.downsample.shortcut.weight",
        "down.0.pyramid.conv.weight",
        "down.1.attentions.0.query.weight",
        "middle_attention.out.bias",
        "up.0.upsample.norm1.style.weight",
        "conv_out.weight",
    ):
        assert name in names


def test_concatenated_pyramid_doubles_the_width_of_the_next_level() -> None:
    config = VARIANTS["input_skip_cat"]
    generator = Generator(config, ImageForm(8, 3))
    state = generator.state_dict()
    assert state["down.0.downsample.conv2.weight"].shape[0] == 8
    assert state["down.1.blocks.0.conv1.weight"].shape[1] == 16
    # middle 16, skip after level 1's block 16, skip after the pyramid 16, skip of level 0's block 8
    assert state["up.0.blocks.0.conv1.weight"].shape[1] == 32
    assert state["up.0.blocks.1.conv1.weight"].shape[1] == 32
    assert state["up.1.blocks.0.conv1.weight"].shape[1] == 24


def test_initial_output_is_as_good_as_zero() -> None:
    for name in ("default", "output_skip"):
        config = VARIANTS[name]
        generator = Generator(config, ImageForm(8, 3))
        assert generator(*inputs(config, 8, 3)).abs().max() < 1e-3
    generator = Generator(TINY, ImageForm(8, 3))
    assert generator.conv_out.weight.abs().max().item() <= (3 * NEAR_ZERO / (9 * (8 + 3) / 2)) ** 0.5


def test_initial_weights_depend_on_the_global_generator_only() -> None:
    def state() -> dict[str, Tensor]:
        torch.manual_seed(5)
        return Generator(TINY, ImageForm(8, 3)).state_dict()

    first, second = state(), state()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_latent_and_time_steer_the_output() -> None:
    generator = awakened(Generator(TINY, ImageForm(8, 3)))
    x_t, _, z = inputs(TINY, 8, 3)
    t0, t1 = torch.tensor([0, 0]), torch.tensor([1, 1])
    assert not torch.allclose(generator(x_t, t0, z), generator(x_t, t1, z))
    assert not torch.allclose(generator(x_t, t0, z), generator(x_t, t0, -z))


def test_without_the_latent_z_changes_nothing_and_the_weights_are_as_many() -> None:
    plain, without = (Generator(replace(TINY, latent=latent), ImageForm(8, 3)) for latent in (True, False))
    assert [p.shape for p in plain.parameters()] == [p.shape for p in without.parameters()]
    x_t, t, z = inputs(TINY, 8, 3)
    awakened(without)
    assert torch.equal(without(x_t, t, z), without(x_t, t, -z))
    assert torch.equal(without(x_t, t, z), without(x_t, t, torch.zeros_like(z)))


def test_float64_agrees_with_float32() -> None:
    generator = awakened(Generator(TINY, ImageForm(8, 3)))
    x_t, t, z = inputs(TINY, 8, 3)
    single = generator(x_t, t, z)
    double = generator.double()(x_t.double(), t, z.double())
    # float32 rounding through about 30 layers
    torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=0)


def test_runs_under_bfloat16_autocast() -> None:
    generator = awakened(Generator(TINY, ImageForm(8, 3)))
    x_t, t, z = inputs(TINY, 8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x0_pred = generator(x_t, t, z)
    # 8 bits of mantissa through about 30 layers
    torch.testing.assert_close(x0_pred.float(), generator(x_t, t, z), atol=0.3, rtol=0)
    x0_pred.sum().backward()


@pytest.mark.parametrize(
    ("config", "image_size", "num_parameters", "flops"),
    [(CIFAR10, 32, 48.43e6, 14.1e9), (LSUN256, 256, 39.73e6, 141.7e9)],
)
def test_size_and_work_are_the_published_ones(
    config: GeneratorConfig, image_size: int, num_parameters: float, flops: float
) -> None:
    with torch.device("meta"):
        generator = Generator(config, ImageForm(image_size, 3))
        x_t, t, z = inputs(config, image_size, 3, B=1)
    assert round(sum(p.numel() for p in generator.parameters()) / 1e4) == round(num_parameters / 1e4)
    with FlopCounterMode(display=False) as counter:
        generator(x_t, t, z)
    # The published figures run the FIR filters at full resolution before they drop pixels: up to 0.7% more.
    assert counter.get_total_flops() == pytest.approx(flops, rel=0.01)


def test_image_that_cannot_be_halved_often_enough_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image_size is 28.*\(1, 2, 2, 2\) make 4 levels.*2 \*\* 3 = 8.*fewer"):
        Generator(GeneratorConfig(), ImageForm(28, 1))
    with pytest.raises(ValueError, match="image_size is 4"):
        Generator(GeneratorConfig(), ImageForm(4, 1))


def test_attention_at_a_side_that_does_not_occur_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_resolutions has 16.*image_size 8.*\[8, 4\]: choose from these"):
        Generator(replace(TINY, attention_resolutions=(16,)), ImageForm(8, 1))


@pytest.mark.parametrize(("base_channels", "message"), [(18, "18 channels"), (36, "72|108|144"), (2, "of width 2")])
def test_widths_that_group_norm_cannot_divide_are_refused(base_channels: int, message: str) -> None:
    config = replace(TINY, base_channels=base_channels, channel_multipliers=(1, 4))
    with pytest.raises(ValueError, match=message):
        Generator(config, ImageForm(8, 1))
