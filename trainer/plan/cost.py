"""The cost of one update, counted by running it on the meta device: real shapes, no memory, no arithmetic.

It runs the code of `trainer.algorithm`, so the figures follow the algorithm. FLOPs are those of convolutions and matrix
products, forward and backward, two per multiply-add.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models.diffusion import Diffusion
from trainer.algorithm.auxiliary import GradientScale
from trainer.algorithm.method import Method, Part
from trainer.algorithm.methods import make_method
from trainer.config.train_config import TrainConfig, planned_precision
from trainer.engine.frozen import learning
from trainer.engine.plain import TorchEngine
from trainer.plan.on_meta import (
    META,
    OneKernelAttention,
    PlayersOnMeta,
    given_on_meta,
    networks_on_meta,
    raw_batch_on_meta,
)
from trainer.plan.remembered import RememberedResults


@dataclass(frozen=True, kw_only=True)
class UpdateCost:
    """The cost of one update of one network with one micro-batch."""

    flops_per_image: float
    """FLOPs per image of the micro-batch, for both networks together."""
    saved_bytes: int
    """Bytes of tensors that autograd saves for backward: the larger part of the activation memory."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Sizes of the networks and costs of the updates."""

    parameters_g: int
    """Number of parameters of the generator."""
    parameters_d: int
    """Number of parameters of the discriminator."""
    learning_g: int
    """Those of the generator that are not frozen."""
    learning_d: int
    """Those of the discriminator that are not frozen."""
    forward_g: float
    """FLOPs of the generator's forward pass for one image."""
    forward_d: float
    """FLOPs of the discriminator's forward pass for one pair of images."""
    update_g: UpdateCost
    """The generator's update."""
    update_d: UpdateCost
    """The discriminator's update without penalties."""
    update_d_penalized: UpdateCost
    """The discriminator's update with the penalties that have a weight; without any, the same as `update_d`."""
    penalty_interval_steps: int | None
    """Interval in steps at which the penalties are applied; None if there are none."""

    @property
    def penalty_flops_per_image(self) -> float:
        """FLOPs per image that the penalties add to a step that has them."""
        return self.update_d_penalized.flops_per_image - self.update_d.flops_per_image

    @property
    def flops_per_image(self) -> float:
        """FLOPs of both updates per training image, averaged over steps with and without penalties."""
        share = 1 / self.penalty_interval_steps if self.penalty_interval_steps else 0.0
        return self.update_g.flops_per_image + self.update_d.flops_per_image + share * self.penalty_flops_per_image

    @property
    def saved_bytes(self) -> int:
        """Bytes that the largest update saves for backward, at one rank's micro-batch."""
        return max(self.update_g.saved_bytes, self.update_d_penalized.saved_bytes)


def count_costs(config: TrainConfig, method: Method[Any] | None = None) -> Costs:
    """Count the costs of a config's networks at its micro-batch; takes half a second.

    Args:
        config: config of the networks.
        method: training method; None: the config's.
    """
    method = method or make_method(config.training, config.generator)
    networks = networks_on_meta(config, method)
    diffusion = Diffusion.from_config(config.diffusion, META)
    players = PlayersOnMeta(
        {part: _engine(network) for part, network in networks.items()},
        diffusion,
        bf16=planned_precision(config) == "bf16",
        gradient_scale=GradientScale(META) if config.training.gradient_normalization else None,
        sees_x_t=config.discriminator.sees == "pair",
    )
    raw = raw_batch_on_meta(config)
    batch, num_images = method.draw(raw, diffusion), len(raw.images)

    x, t = torch.empty((1, *config.network_form.shape), device=META), torch.zeros(1, dtype=torch.int64, device=META)
    z, given = torch.empty(1, config.generator.latent_dim, device=META), given_on_meta(config, 1)
    with RememberedResults(), torch.no_grad():
        forward_g = _count_flops(lambda: networks["g"](x, t, z, *given))
        forward_d = _count_flops(lambda: networks["d"](x, x, t, *given)) if "d" in networks else 0.0

    def update(part: Part, method: Method[Any]) -> UpdateCost:
        if part not in method.parts:
            return UpdateCost(flops_per_image=0.0, saved_bytes=0)
        with RememberedResults(), OneKernelAttention():
            return _count(lambda: method.update(part, players, [batch], 0), networks.values(), num_images)

    update_d = update("d", method.without_penalties())
    return Costs(
        parameters_g=_numel(networks["g"].parameters()),
        parameters_d=_numel(networks["d"].parameters()) if "d" in networks else 0,
        learning_g=_numel(learning(networks["g"])),
        learning_d=_numel(learning(networks["d"])) if "d" in networks else 0,
        forward_g=forward_g,
        forward_d=forward_d,
        update_g=update("g", method),
        update_d=update_d,
        update_d_penalized=update("d", method) if method.penalties else update_d,
        penalty_interval_steps=method.penalty_interval_steps if method.penalties else None,
    )


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _engine(module: nn.Module) -> TorchEngine:
    """An engine that never reaches the optimizer's update, which the FLOPs do not include."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    return TorchEngine(module, optimizer, grad_accum_steps=2**31, max_gradient_norm=None)


class _FlopCounter(TorchDispatchMode):
    """Sums torch's own formulas; torch's FlopCounterMode also tracks modules by hooks, which R1's gradient breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out) - _beyond_groups(func, args, out)
        return out


def _beyond_groups(func: Any, args: Any, out: Any) -> int:
    """What torch's formula counts too much: it takes the weight's gradient of a grouped convolution for a full one."""
    if func is not torch.ops.aten.convolution_backward.default or args[-2] == 1 or not args[-1][1]:
        return 0
    groups, of_weight = args[-2], [False, True, False]
    counted = flop_registry[func.overloadpacket](*args[:-1], of_weight, out_val=out)
    return counted - counted // groups


def _count_flops(run: Callable[[], Any]) -> float:
    with _FlopCounter() as counter:
        run()
    return counter.total


def _count(update: Callable[[], Any], networks: Iterable[nn.Module], batch_size: int) -> UpdateCost:
    """Run an update and count its FLOPs and the bytes that it saves for backward, without parameters."""
    known = {t.untyped_storage()._cdata for m in networks for t in (*m.parameters(), *m.buffers())}
    saved: dict[int, Tensor] = {}  # Keeps the tensors alive, so that no storage address is reused.

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in known:
            saved[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        flops = _count_flops(update)
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return UpdateCost(flops_per_image=flops / batch_size, saved_bytes=total)
