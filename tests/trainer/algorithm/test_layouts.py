"""In channels_last, as on a GPU, no operation of an update has a feature map in another layout."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.diffusion import Diffusion
from models.layers import Convolution, gradients_of_inputs, is_channels_last
from models.networks.build import build_discriminator, build_generator
from trainer.algorithm.method import Players
from trainer.algorithm.methods import make_method
from trainer.algorithm.pairs import Pair, RawBatch, laid_out
from trainer.algorithm.randomness import Draws
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig
from trainer.engine.plain import TorchEngine, make_adam

aten = torch.ops.aten
COPIES = (aten.clone.default, aten._to_copy.default, aten.copy_.default)


def is_map(x: Any) -> bool:
    """Whether x is a feature map, whose layout matters: a vector or an image of one channel has both layouts."""
    return isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] > 1 and x.shape[2] * x.shape[3] > 1


def is_last(x: Tensor) -> bool:
    """Whether the channels of x are next to each other in memory; slices and broadcast maps count by their order."""
    _, channel, row, column = x.stride()
    return 0 in x.stride() or channel <= column <= row


class Layouts(TorchDispatchMode):
    """Counts operations on feature maps while it is entered.

    Attributes:
        copies: copies from one layout to another, by operation and shape.
        others: other operations with an argument or a result that is not in channels_last, likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self.others: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        maps = [x for x in tree_leaves((args, kwargs, out)) if is_map(x)]
        wrong = [x for x in maps if not is_last(x)]
        if wrong and not func.is_view:
            counter = self.copies if func in COPIES else self.others
            counter[str(func), tuple(wrong[0].shape)] += 1
        return out


CPU = torch.device("cpu")
NARROW = (
    "generator.base_channels=8",
    "generator.num_res_blocks=1",
    "generator.latent_embedding_dim=8",
    "discriminator.base_channels=4",
    "discriminator.time_embedding_dim=8",
    "training.r1_gamma=0.1",
    "training.r2_gamma=0.1",
)
CONFIGS = {
    "cifar10": ("cifar10", "data.image_size=16", "generator.attention_resolutions=[8]"),
    "large": ("lsun256", "data.image_size=128", "generator.attention_resolutions=[8]"),
    "skips": (
        "cifar10",
        "data.image_size=16",
        "generator.attention_resolutions=[]",
        "generator.progressive_input=input_skip",
        "generator.progressive_combine=cat",
        "generator.progressive_output=output_skip",
        "generator.resample=nearest",
        "training.objective=relativistic",
    ),
    "finite differences": (
        "cifar10",
        "data.image_size=16",
        "generator.attention_resolutions=[]",
        "training.penalty=finite_difference",
    ),
    "resnext": (
        "cifar10",
        "data.image_size=16",
        "generator.attention_resolutions=[]",
        "discriminator.kind=resnext",
    ),
    "predictions": (
        "cifar10",
        "data.image_size=16",
        "generator.attention_resolutions=[]",
        "discriminator.sees=marginal",
        "discriminator.predicts=[x0, x_t]",
        "training.denoising=1",
        "training.afd=1",
    ),
}


def players_of(config: TrainConfig, memory_format: torch.memory_format, *, bf16: bool = False) -> Players:
    torch.manual_seed(0)
    networks = {
        "d": build_discriminator(config.discriminator, config.image_form),
        "g": build_generator(config.generator, config.image_form),
    }
    for network in networks.values():
        for p in network.parameters():
            p.data.add_(0.1 * torch.randn(p.shape))  # near-zero initial layers would hide errors
        network.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]
    engines: Any = {part: TorchEngine(network, make_adam(network, CPU), 1, None) for part, network in networks.items()}
    return Players(engines, Diffusion.from_config(config.diffusion), bf16=bf16, memory_format=memory_format)


def in_float64(pair: Pair) -> Pair:
    x_tm1, x_t, z, noise = (x.double() for x in (pair.x_tm1, pair.x_t, pair.z, pair.noise_posterior))
    return replace(pair, x_tm1=x_tm1, x_t=x_t, z=z, noise_posterior=noise)


def updates_of(config: TrainConfig, players: Players, *, float64: bool = False) -> dict[str, Callable[[], Any]]:
    images = torch.randint(0, 256, (4, *config.image_form.shape), dtype=torch.uint8)
    draws, latent_dim = Draws(0, 0, torch.arange(4)), config.generator.latent_dim
    raw = RawBatch(images, draws, latent_dim, flip=True, share=1.0, memory_format=players.memory_format)
    method = make_method(config.training, config.generator)
    batch = method.draw(raw, players.diffusion)
    if float64:
        batch = replace(batch, pair_d=in_float64(batch.pair_d), pair_g=in_float64(batch.pair_g))
    plain = method.without_penalties()
    return {
        "d": lambda: plain.update("d", players, [batch], 0),
        "d with r1 and r2": lambda: method.update("d", players, [batch], 0),
        "g": lambda: method.update("g", players, [batch], 0),
    }


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_no_feature_map_leaves_channels_last(name, bf16):
    base, *more = CONFIGS[name]
    config = load_config(base, [*NARROW, *more])
    players = players_of(config, torch.channels_last, bf16=bf16)
    for update in updates_of(config, players).values():
        with Layouts() as layouts:
            update()
        assert not layouts.copies
        assert not layouts.others
    for engine in players.engines.values():
        weights = [p for p in engine.module.parameters() if p.dim() == 4 and p.shape[2] > 1 and p.shape[1] > 1]
        assert weights
        assert all(map(is_channels_last, weights))


def test_a_wrong_layout_is_counted():
    weight = torch.randn(4, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 8, 8)
    with Layouts() as layouts:
        F.conv2d(x, weight).contiguous()
        x.contiguous(memory_format=torch.channels_last)
    assert layouts.others == {("aten.convolution.default", (2, 4, 8, 8)): 1}
    assert sum(layouts.copies.values()) == 2


def gradients(config: TrainConfig, memory_format: torch.memory_format, part: str) -> dict[str, Tensor]:
    players = players_of(config, memory_format)
    for engine in players.engines.values():
        engine.module.double()
    players = replace(players, diffusion=Diffusion(**{k: v.double() for k, v in vars(players.diffusion).items()}))
    taken: dict[str, Tensor] = {}
    for network in players.engines.values():
        network.step = lambda **_: None  # pyright: ignore[reportAttributeAccessIssue]
    torch.manual_seed(1)
    updates_of(config, players, float64=True)[part]()
    for name, engine in players.engines.items():
        taken |= {f"{name}.{n}": p.grad for n, p in engine.module.named_parameters() if p.grad is not None}
    return taken


@pytest.mark.parametrize("part", ["d", "d with r1 and r2", "g"])
def test_gradients_in_channels_last_equal_those_in_the_plain_layout(part):
    config = load_config("cifar10", [*NARROW, *CONFIGS["cifar10"][1:]])
    plain, last = (gradients(config, layout, part) for layout in (torch.contiguous_format, torch.channels_last))
    assert plain.keys() == last.keys()
    for name, gradient in plain.items():
        # what is left is the order of float64 sums
        torch.testing.assert_close(last[name], gradient, rtol=1e-9, atol=1e-9 * gradient.abs().max().item() + 1e-12)


class Products(Layouts):
    """Counts convolutions: (forward, input gradients, weight gradients)."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = [0, 0, 0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.counts[0] += 1
        elif func is torch.ops.aten.convolution_backward.default:
            self.counts[1] += args[-1][0]
            self.counts[2] += args[-1][1]
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("bias", [True, False])
def test_second_derivative_of_a_convolution_is_one_of_each_product(bias):
    conv = Convolution(3, 5, 3, padding=1, bias=bias).double()
    conv.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
    results = []
    for forward in (conv, lambda x: F.conv2d(x, conv.weight, conv.bias, padding=1)):
        conv.zero_grad()
        with Products() as inner, gradients_of_inputs():
            y = forward(x)
            (slope,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        with Products() as outer:
            (y.square().sum() + slope.square().sum()).backward()
        results.append([slope.detach(), *(p.grad for p in conv.parameters())])
        if forward is conv:
            assert inner.counts == [1, 1, 0]
            # R1's slope: one forward product and one for the weight; the loss: one for the weight, and x's gradient
            assert outer.counts[0] == 1 and outer.counts[2] == 2
            assert not outer.copies and not outer.others
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)


def test_gradients_of_inputs_leaves_out_the_weights_only_inside():
    conv = Convolution(3, 4, 1)
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    conv(x).sum().backward()
    assert conv.weight.grad is not None
    conv.zero_grad()
    with gradients_of_inputs():
        conv(x).sum().backward()
    assert conv.weight.grad is None


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_laid_out_without_a_needless_copy(channels):
    x = torch.randn(2, channels, 4, 6)
    assert laid_out(x, torch.contiguous_format) is x
    last = laid_out(x, torch.channels_last)
    assert torch.equal(last, x)
    assert last.stride() == (24 * channels, 1, 6 * channels, channels)
    assert (last.data_ptr() == x.data_ptr()) is (channels == 1)
