"""What one update costs, counted by running it on the meta device: real shapes, no memory, no arithmetic.

The counted code is `trainer.algorithm.step` itself, so the figures follow the algorithm. FLOPs are those of
convolutions and matrix products, forward and backward, two per multiply-add.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from models.diffusion import Diffusion
from models.networks import build_discriminator, build_generator
from trainer.algorithm.losses import OBJECTIVES
from trainer.algorithm.pairs import MicroBatch, Pair
from trainer.algorithm.regression import NoisyBatch, update_denoiser
from trainer.algorithm.step import Players, update_discriminator, update_generator
from trainer.config.train_config import TrainConfig, split_batch
from trainer.engine.plain import TorchEngine

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class UpdateCost:
    """One update of one network with one micro-batch."""

    flops_per_image: float
    """FLOPs for each image of the micro-batch, both networks together."""
    saved_bytes: int
    """Tensors that autograd keeps for backward: the larger part of the activation memory."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Sizes of the networks and costs of the updates."""

    parameters_g: int
    """Parameters of the generator."""
    parameters_d: int
    """Parameters of the discriminator."""
    forward_g: float
    """FLOPs of the generator's forward pass for one image."""
    forward_d: float
    """FLOPs of the discriminator's forward pass for one pair of images."""
    update_g: UpdateCost
    """The generator's update."""
    update_d: UpdateCost
    """The discriminator's update without R1."""
    update_d_r1: UpdateCost
    """The discriminator's update with R1, and R2 where it has a weight."""

    def flops_per_image(self, r1_interval_steps: int | None) -> float:
        """FLOPs of both updates for one training image, averaged over steps with R1 and without; None: never R1."""
        r1_extra = self.update_d_r1.flops_per_image - self.update_d.flops_per_image
        share = 1 / r1_interval_steps if r1_interval_steps else 0.0
        return self.update_g.flops_per_image + self.update_d.flops_per_image + share * r1_extra


def measure_costs(config: TrainConfig, d_update: Callable[..., Any] = update_discriminator) -> Costs:
    """Count the costs of a config's networks at its micro-batch; takes about a second.

    Args:
        config: of the networks.
        d_update: the update of the discriminator.
    """
    data = config.data
    rng_state = torch.get_rng_state()
    with META:
        form = {name: getattr(data, name) for name in ("image_size", "image_channels", "num_classes")}
        generator = build_generator(config.generator, **form)
        discriminator = build_discriminator(config.discriminator, **form)
    batch = _micro_batch(config, split_batch(config).micro_batch_size)
    players = Players(
        generator=_engine(generator),
        discriminator=_engine(discriminator),
        diffusion=Diffusion.from_config(config.diffusion, META),
        r1_gamma=config.training.r1_gamma,
        objective=OBJECTIVES.get(config.training.objective, OBJECTIVES["non_saturating"]),
    )
    # One image: the batch is as large as it needs to be only for the memory.
    one, t, z = batch.pair_g.x_t[:1], batch.pair_g.t[:1], batch.pair_g.z[:1]
    label = None if batch.pair_g.label is None else batch.pair_g.label[:1]
    if config.training.objective not in OBJECTIVES:
        torch.set_rng_state(rng_state)
        return _costs_of_regression(config, generator, players, batch, label)
    with torch.no_grad():
        forward_g = _count_flops(lambda: generator(one, t, z, label))
        forward_d = _count_flops(lambda: discriminator(one, one, t, label))
    with_r2 = config.training.r2_gamma > 0
    update_d, update_d_r1 = (
        _measure(lambda options=options: d_update(players, [batch], **options), players, batch)
        for options in (
            {"with_r1": False},
            {"with_r1": config.training.r1_gamma > 0 or not with_r2, "with_r2": with_r2},
        )
    )
    update_g = _measure(lambda: update_generator(players, [batch]), players, batch)
    if config.training.precision == "bf16":
        # Activations take half; on R1 steps the real half of D's pass stays float32.
        halved = update_d.saved_bytes // 2
        in_r1 = update_d_r1.saved_bytes - halved
        update_d_r1 = UpdateCost(flops_per_image=update_d_r1.flops_per_image, saved_bytes=in_r1 + halved // 2)
        update_d = UpdateCost(flops_per_image=update_d.flops_per_image, saved_bytes=halved)
        update_g = UpdateCost(flops_per_image=update_g.flops_per_image, saved_bytes=update_g.saved_bytes // 2)
    torch.set_rng_state(rng_state)
    return Costs(
        parameters_g=sum(p.numel() for p in generator.parameters()),
        parameters_d=sum(p.numel() for p in discriminator.parameters()),
        forward_g=forward_g,
        forward_d=forward_d,
        update_g=update_g,
        update_d=update_d,
        update_d_r1=update_d_r1,
    )


def _costs_of_regression(
    config: TrainConfig, generator: nn.Module, players: Players, batch: MicroBatch, label: Tensor | None
) -> Costs:
    """Costs of objective gaussian, which has no discriminator."""
    pair, nothing = batch.pair_g, UpdateCost(flops_per_image=0.0, saved_bytes=0)
    noisy = NoisyBatch(pair.t, pair.x_tm1, pair.x_t, pair.z, share=1.0, label=pair.label)
    with torch.no_grad():
        forward_g = _count_flops(lambda: generator(pair.x_t[:1], pair.t[:1], pair.z[:1], label))
    update_g = _measure(lambda: update_denoiser(players, [noisy], config.training.prediction), players, batch)
    if config.training.precision == "bf16":
        update_g = UpdateCost(flops_per_image=update_g.flops_per_image, saved_bytes=update_g.saved_bytes // 2)
    return Costs(
        parameters_g=sum(p.numel() for p in generator.parameters()),
        parameters_d=0,
        forward_g=forward_g,
        forward_d=0.0,
        update_g=update_g,
        update_d=nothing,
        update_d_r1=nothing,
    )


def _engine(module: nn.Module) -> TorchEngine:
    """An engine that never comes to the optimizer's update, which the FLOPs do not count."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    return TorchEngine(module, optimizer, grad_accum_steps=2**31, max_gradient_norm=None)


def _micro_batch(config: TrainConfig, batch_size: int) -> MicroBatch:
    shape = (batch_size, config.data.image_channels, config.data.image_size, config.data.image_size)

    def pair() -> Pair:
        return Pair(
            t=torch.zeros(batch_size, dtype=torch.int64, device=META),
            x_tm1=torch.empty(shape, device=META),
            x_t=torch.empty(shape, device=META),
            z=torch.empty(batch_size, config.generator.latent_dim, device=META),
            noise_posterior=torch.empty(shape, device=META),
            label=torch.zeros(batch_size, dtype=torch.int64, device=META) if config.data.num_classes else None,
        )

    return MicroBatch(pair_d=pair(), pair_g=pair(), share=1.0)


class _FlopCounter(TorchDispatchMode):
    """Sums torch's own formulas; torch's FlopCounterMode follows modules by hooks too, which R1's gradient breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _count_flops(run: Callable[[], Any]) -> float:
    with _FlopCounter() as counter:
        run()
    return counter.total


def _measure(update: Callable[[], Any], players: Players, batch: MicroBatch) -> UpdateCost:
    """Run an update, counting its FLOPs and the bytes of what it saves for backward, parameters aside."""
    modules = (players.generator.module, players.discriminator.module)
    known = {t.untyped_storage()._cdata for m in modules for t in (*m.parameters(), *m.buffers())}
    saved: dict[int, Tensor] = {}  # Holds the tensors, so that no storage's address is used twice.

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in known:
            saved[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        flops = _count_flops(update)
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return UpdateCost(flops_per_image=flops / len(batch.pair_g.t), saved_bytes=total)
