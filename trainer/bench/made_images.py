"""A data set of generated images that fits a config, so that a benchmark needs no download."""

import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image

from data.images.shown import PICTURE_CHANNELS
from data.prepare import command as prepare
from data.sources.pairs import PREFIX
from trainer.config.train_config import TrainConfig

NUM_IMAGES = 512


def make_images(config: TrainConfig, folder: Path) -> Path:
    """Prepare smooth noise, which compresses about as well as photographs; each class has a colour.

    Args:
        config: its data section gives size, channels and the number of classes; 10 if it has none.
        folder: where the files are written.

    Returns:
        The folder of the prepared data set.

    Raises:
        OSError: the files cannot be written.
    """
    size, channels = config.data.image_size, config.data.image_channels
    source, out = folder / "made", folder / "made-shards"
    num_classes, coarse_size = config.data.num_classes or 10, max(1, size // 4)
    colours = np.random.default_rng(0).integers(32, 224, (num_classes, 3))
    for number in range(max(NUM_IMAGES, num_classes, config.training.global_batch_size)):
        label, noise = (
            number % num_classes,
            np.random.default_rng(number).integers(-64, 64, (coarse_size, coarse_size, 3)),
        )
        coarse = np.clip(colours[label] + noise, 0, 255).astype(np.uint8)
        of_class = source / f"{label:06d}"
        of_class.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        if channels in PICTURE_CHANNELS:
            image.save(of_class / f"{number:05d}.png")
        else:  # of pairs
            np.save(of_class / f"{number:05d}.npy", np.tile(np.asarray(image), 3)[..., :channels])
    form = ["--size", str(size), "--channels", str(channels)]
    arguments = [str(source), "--classes", "folders", *form]
    if given := config.data.condition_channels:
        pairs = f"{PREFIX}{_made_conditions(source, given, size, folder)}:{source}"
        arguments = [pairs, "--classes", "folders", "--condition-channels", str(given), *form]
    with redirect_stdout(sys.stderr):
        if prepare.main([*arguments, "--out", str(out)]):
            raise OSError(f"no images could be made in {folder}")
    return out


def _made_conditions(source: Path, channels: int, size: int, folder: Path) -> Path:
    """An array of noise for each image of `source`."""
    conditions = folder / "made-conditions"
    for number, file in enumerate(sorted(file for file in source.rglob("*.*") if file.is_file())):
        out = (conditions / file.relative_to(source)).with_suffix(".npy")
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, np.random.default_rng(number).integers(0, 256, (size, size, channels), dtype=np.uint8))
    return conditions
