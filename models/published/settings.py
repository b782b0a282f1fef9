"""Converts the authors' settings into our configs (DDGAN, arXiv 2112.07804).

Training settings may be mixed with network settings; they are ignored. Unknown names are refused.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from models.discriminator import DiscriminatorConfig
from models.generator import GeneratorConfig
from models.shapes import ImageForm

# Network settings with the published defaults.
DEFAULTS: dict[str, Any] = {
    "image_size": 32,
    "num_channels": 3,
    "num_channels_dae": 128,
    "n_mlp": 3,
    "ch_mult": (1, 2, 2, 2),
    "num_res_blocks": 2,
    "attn_resolutions": (16,),
    "dropout": 0.0,
    "fir": True,
    "fir_kernel": (1, 3, 3, 1),
    "skip_rescale": True,
    "resblock_type": "biggan",
    "progressive": "none",
    "progressive_input": "residual",
    "progressive_combine": "sum",
    "embedding_type": "positional",
    "fourier_scale": 16.0,
    "not_use_tanh": False,
    "nz": 100,
    "z_emb_dim": 256,
    "t_emb_dim": 256,
    "ngf": 64,
    # Not a published name: the published training chooses the discriminator by the data set.
    "kind": None,
    # Switches of the published code that only work at their defaults.
    "centered": True,
    "conditional": True,
    "resamp_with_conv": True,
}

# Values supported here, where the published code allows more.
ALLOWED: dict[str, tuple[object, ...]] = {
    "fir_kernel": ((1, 3, 3, 1),),
    "resblock_type": ("biggan", "biggan_oneadagn"),
    "progressive": ("none", "output_skip"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "embedding_type": ("positional", "fourier"),
    "kind": (None, "small", "large"),
    "centered": (True,),
    "conditional": (True,),
    "resamp_with_conv": (True,),
}

# Settings that do not change a network.
DIFFUSION = {"num_timesteps", "use_geometric", "beta_min", "beta_max"}
LENGTH = {"batch", "batch_size", "steps", "num_epoch", "seed", "resume", "exp", "dataset"}
ADAM = {"lr_g", "lr_d", "no_lr_decay", "beta1", "beta2", "adam_betas"}
LOSS = {"use_ema", "ema_decay", "r1_gamma", "lazy_reg"}
SAVING = {"save_content", "save_content_every", "save_ckpt_every", "epoch_id", "compute_fid", "real_img_dir"}
LAUNCH = {"num_proc_node", "num_process_per_node", "node_rank", "local_rank", "master_address"}
IGNORED = frozenset(DIFFUSION | LENGTH | ADAM | LOSS | SAVING | LAUNCH)


def generator_config(settings: Mapping[str, object]) -> GeneratorConfig:
    """Convert published settings to our generator config.

    Raises:
        ValueError: A name is unknown (the message suggests the nearest one), or a value is not supported.
    """
    known = _complete(settings)
    # The published code ignores attention resolutions that no level has; our config refuses them.
    sides = [known["image_size"] >> level for level in range(len(known["ch_mult"]))]
    return GeneratorConfig(
        base_channels=known["num_channels_dae"],
        channel_multipliers=known["ch_mult"],
        num_res_blocks=known["num_res_blocks"],
        attention_resolutions=tuple(side for side in known["attn_resolutions"] if side in sides),
        dropout=float(known["dropout"]),
        resample="fir" if known["fir"] else "nearest",
        skip_rescale=known["skip_rescale"],
        block_type=known["resblock_type"],
        progressive_output=known["progressive"],
        progressive_input=known["progressive_input"],
        progressive_combine=known["progressive_combine"],
        time_embedding=known["embedding_type"],
        fourier_scale=float(known["fourier_scale"]),
        output_tanh=not known["not_use_tanh"],
        latent_dim=known["nz"],
        latent_embedding_dim=known["z_emb_dim"],
        num_mapping_layers=known["n_mlp"],
    )


def discriminator_config(settings: Mapping[str, object], *, is_large: bool) -> DiscriminatorConfig:
    """Convert published settings to our discriminator config, with the published minibatch deviation grouping.

    Args:
        settings: Published names.
        is_large: Whether it is the large discriminator, if `kind` is absent.

    Raises:
        ValueError: A name is unknown (the message suggests the nearest one), or a value is not supported.
    """
    known = _complete(settings)
    return DiscriminatorConfig(
        kind=known["kind"] or ("large" if is_large else "small"),
        base_channels=known["ngf"],
        time_embedding_dim=known["t_emb_dim"],
        stddev_grouping="strided",
    )


def image_form(settings: Mapping[str, object]) -> ImageForm:
    """Size and channels of the images."""
    known = _complete(settings)
    return ImageForm(known["image_size"], known["num_channels"])


def _complete(settings: Mapping[str, object]) -> dict[str, Any]:
    """All network settings, checked, with defaults filled in."""
    known = dict(DEFAULTS)
    for name, value in settings.items():
        if name in DEFAULTS:
            known[name] = tuple(value) if isinstance(value, list) else value
        elif name not in IGNORED:
            near = difflib.get_close_matches(name, [*DEFAULTS, *IGNORED], n=1, cutoff=0)
            raise ValueError(
                f"{name} is not a published setting. Allowed are {', '.join(DEFAULTS)}, and training settings, which "
                f"are ignored. Did you mean {near[0]}?"
            )
    for name, allowed in ALLOWED.items():
        if known[name] not in allowed:
            raise ValueError(
                f"{name} is {known[name]!r}, but only {' or '.join(map(repr, allowed))} can be built here. Networks "
                "trained with other values cannot be loaded"
            )
    return known
