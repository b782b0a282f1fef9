"""A data set of generated images that fits a config, so that a benchmark needs no download."""

import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image

from data.prepare import command as prepare
from trainer.config.train_config import TrainConfig

NUM_IMAGES = 512


def make_images(config: TrainConfig, folder: Path) -> Path:
    """Prepare smooth noise, which compresses about as well as photographs.

    Args:
        config: its data section gives size and channels.
        folder: where the files are written.

    Returns:
        The folder of the prepared data set.

    Raises:
        OSError: the files cannot be written.
    """
    size, channels = config.data.image_size, config.data.image_channels
    source, out = folder / "made", folder / "made-shards"
    source.mkdir()
    for number in range(max(NUM_IMAGES, config.training.global_batch_size)):
        coarse = np.random.default_rng(number).integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(source / f"{number:05d}.png")
    with redirect_stdout(sys.stderr):
        if prepare.main([str(source), "--out", str(out), "--size", str(size), "--channels", str(channels)]):
            raise OSError(f"no images could be made in {folder}")
    return out
