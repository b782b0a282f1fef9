"""What the page can ask for: a function for each of its forms, from the form's words to images. Knows no server."""

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args

import torch

from data.images.shown import PICTURE_CHANNELS, tiles_of
from data.storage.arguments import ranges_of_whole_numbers, whole_number, whole_numbers
from data.storage.errors import UserError
from models.shapes import Uint8Image
from trainer.config.train_config import TrainConfig
from trainer.sample.conditions import as_pictures, read_condition, translations
from trainer.sample.draw import Loaded, images_at_once, sample_batches
from trainer.sample.edit import Way, check_label, edit_of, edited, known_pixels
from trainer.sample.given import given_image, opaque_pixels
from trainer.sample.images import to_uint8
from trainer.sample.walk import walk

T = TypeVar("T")

MAX_IMAGES = 64
MAX_FRAMES = 200
MAX_REPEATS = 20
MAX_FILE_PIXELS = 50_000_000
"""Of an image file that is decoded."""
SEED = whole_number(0, 2**63 - 1)


@dataclass(frozen=True)
class Asked:
    """A form as it was sent.

    Attributes:
        words: the text of each field; one that is left blank is not there.
        content: the image file that came with it.
    """

    words: Mapping[str, str]
    content: bytes = b""

    def get(self, name: str, parse: Callable[[str], T], default: str) -> T:
        """The value of a field.

        Raises:
            UserError: its text is no such value; says what is allowed.
        """
        try:
            return parse(self.words.get(name, default))
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{name}: {error}") from None

    def find(self, name: str, parse: Callable[[str], T]) -> T | None:
        """The value of a field that may be left blank, then None; raises what `get` raises."""
        return self.get(name, parse, "") if name in self.words else None


Action = Callable[[Loaded, Asked], Iterator[Uint8Image]]
"""Gives a batch of images at a time, on the CPU; raises UserError or BadImageError."""


def draw(loaded: Loaded, asked: Asked) -> Iterator[Uint8Image]:
    """The samples of a seed, those of `trainer.sample --seed --num --classes`."""
    label = asked.find("class", whole_number(0))
    return sample_batches(
        *loaded,
        num=asked.get("num", whole_number(1, MAX_IMAGES), "16"),
        seed=asked.get("seed", SEED, "0"),
        classes=None if label is None else [label],
    )


def walk_between(loaded: Loaded, asked: Asked) -> Iterator[Uint8Image]:
    """The frames from seed to seed, those of `trainer.walk --seeds --classes --frames --open`."""
    return walk(
        *loaded,
        seeds=asked.get("seeds", ranges_of_whole_numbers, "0-2"),
        classes=asked.find("classes", whole_numbers),
        num_frames=asked.get("frames", whole_number(2, MAX_FRAMES), "49"),
        closed=False,
    )


def prepare(loaded: Loaded, asked: Asked) -> Iterator[Uint8Image]:
    """An image file in the form of the run's images, to be painted on and edited."""
    yield to_uint8(given_image(asked.content, loaded[2], max_pixels=MAX_FILE_PIXELS))[None]


def edit(loaded: Loaded, asked: Asked) -> Iterator[Uint8Image]:
    """Edits of an image file, those of `trainer.edit`; the way `mask` fills its transparent parts (`--mask alpha`)."""
    generator, diffusion, config = loaded
    way = asked.get("way", _way, "")
    factor = asked.get("upscale", whole_number(2), "2") if way == "upscale" else 1
    label, num = asked.find("class", whole_number(0)), asked.get("num", whole_number(1, MAX_IMAGES), "8")
    wanted = edit_of(
        way,
        config,
        label,
        factor=factor,
        start=asked.find("start", whole_number(1)),
        repeats=asked.get("resample", whole_number(1, MAX_REPEATS), "1"),
        seed=asked.get("seed", SEED, "0"),
    )
    device = next(generator.parameters()).device
    given = given_image(asked.content, config, factor=factor, max_pixels=MAX_FILE_PIXELS).to(device)
    if way == "mask":
        wanted = replace(wanted, keep=known_pixels(opaque_pixels(asked.content, config)[None].to(device)))
    for numbers in torch.arange(num, device=device).split(images_at_once(config.data.image_size)):
        images = given.expand(len(numbers), -1, -1, -1)
        labels = None if label is None else torch.full_like(numbers, label)
        yield edited(generator, diffusion, config, wanted, images, numbers, labels).cpu()


def translate(loaded: Loaded, asked: Asked) -> Iterator[Uint8Image]:
    """What an image or .npy file gives, as an image, then its results, those of `trainer.translate --num --seed`."""
    config, label = loaded[2], asked.find("class", whole_number(0))
    if not config.data.condition_channels:
        raise UserError("this run was not trained on pairs, so it cannot translate")
    check_label(label, config.data.num_classes)
    condition = read_condition(asked.content, config, max_pixels=MAX_FILE_PIXELS)
    num, seed = asked.get("num", whole_number(1, MAX_IMAGES), "7"), asked.get("seed", SEED, "0")
    yield as_pictures(condition, config.data.image_channels)
    yield from translations(loaded, [(condition, label)], num=num, seed=seed)


def _way(text: str) -> Way:
    for way in get_args(Way):
        if text == way:
            return way
    raise argparse.ArgumentTypeError(f"{text!r} is given, allowed are {', '.join(get_args(Way))}")


ACTIONS: Mapping[str, Action] = {
    "draw": draw,
    "walk": walk_between,
    "prepare": prepare,
    "edit": edit,
    "translate": translate,
}
"""By the name that a form of the page has as its action: a further form needs a line here and a section in the page."""


def facts(config: TrainConfig, name: str, max_bytes: int) -> dict[str, Any]:
    """What the page must know of the model to offer only what it can do.

    Args:
        config: of the run.
        name: of the run.
        max_bytes: of an image file.
    """
    size, channels = config.data.image_size, config.image_form.channels
    return {
        "name": name,
        "size": size,
        "width": size * tiles_of(channels),
        "channels": channels if channels in PICTURE_CHANNELS else 1,
        "classes": config.data.num_classes,
        "translates": config.data.condition_channels > 0,
        "steps": config.diffusion.num_timesteps,
        "factors": [factor for factor in range(2, size // 2 + 1) if size % factor == 0],
        "most": {"num": MAX_IMAGES, "frames": MAX_FRAMES, "resample": MAX_REPEATS},
        "max_bytes": max_bytes,
    }
