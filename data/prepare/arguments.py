"""Arguments of `python -m data.prepare SOURCE`; those of its other commands are in data/sets."""

import argparse
import os
from collections.abc import Sequence
from typing import get_args

from data.images.shown import MAX_CHANNELS, PICTURE_CHANNELS
from data.prepare.encode import PreparedForm
from data.prepare.filters import Dedup, Filters, aspect
from data.prepare.job import PrepareOptions
from data.prepare.where import Condition, ConditionError
from data.sets.arguments import COMMANDS, MAX_WORKERS, Parser, UsageError, default_workers
from data.sets.arguments import parser_of as parser_of_set_command
from data.shards.index import MAX_IMAGE_SIZE
from data.sources.pairs import Side
from data.sources.source import Source
from data.storage.arguments import whole_number
from data.storage.paths import location_argument

_MIN_SIZE = 4
_DEFAULT_SHARD_SAMPLES = 4096
_EPILOG = """sources:
  gaussians25          25,000 points of a mixture of 25 Gaussians in the plane, drawn by --seed
  digits               1,797 handwritten digits of scikit-learn, 8x8 grey, enlarged to 16x16 without --size
  cifar10, mnist, fashionmnist, stackedmnist
                       fetched from where they are published, verified, and kept in ~/.cache/ddgan/sources
  a folder             of images; its sub-folders, if any, are the classes (ImageNet, CelebA-HQ as files), or the
                       labels are in its dataset.json (StyleGAN, EDM)
  a .zip               of images, in the same form
  CIFAR-10             cifar-10-python.tar.gz, or the folder cifar-10-batches-py that it unpacks to
  mnist:PATH           a folder of idx files (train-images-idx3-ubyte.gz and so on), or .npz files of images and labels
  fashionmnist:PATH    the same files, with the names of garments
  stackedmnist:PATH    three digits of that MNIST as the channels of one image, drawn by --seed; labels 0-999
  an LMDB              a folder with data.mdb: LSUN (encoded images), CelebA-HQ (encoded images or raw 256x256x3 bytes)
  pairs:CONDITIONS:IMAGES
                       for image-to-image translation: two folders or zip files, whose files of equal names (up to the
                       suffix) are pairs, of 1 to 8 channels each (TIFF, .npy); conditions may be smaller
  pairs:TARS:SUFFIX:SUFFIX
                       members of tar files, KEY.SUFFIX, such as pairs:shards:edges.png:jpg; the condition first
  pairs:FOLDER         with --side-by-side: each image holds both
  digits4x, digitsblur the digits at 16 px, each with itself at 4 px, or blurred: pairs to try it with
  parquet:PATH         Parquet or Arrow tables: a file, or a folder, also one of Hugging Face's datasets; a column has
                       the images as bytes, structs of bytes and path, or paths from the folder of the table
  hf:OWNER/NAME        tables on the Hugging Face Hub, of the revision OWNER/NAME@REVISION if it is given
  WebDataset shards    made by others, such as img2dataset's: a .tar, or a folder of them
  a URL                s3://, gs:// or another storage: a folder of images, which are read where they are, or of shards
                       or tables, which are copied first; http(s)://: an archive, a shard or a table, copied first
The content of a path shows its kind, except for the three kinds of MNIST, whose files look alike. KIND:PATH gives the
kind: folder, zip, cifar10, mnist, fashionmnist, stackedmnist, lmdb, webdataset or parquet. ./digits, ./inspect and
the like are folders of these names.

other commands:
  inspect DIR          summary and contact sheet of a prepared data set
  verify DIR           hash every shard and decode every image of a prepared data set
  push DIR URL         copy a prepared data set to s3:// or other storage
  pull URL DIR         copy a prepared data set from there, or from a web server
  merge DIR DIR --out DIR
                       join prepared data sets of one form

A command that was stopped or killed continues after its last finished shard when it is given again. The result is the
same, bit for bit.

exit codes: 0 done or already there, 1 failed (bad images, full disk), 2 wrong arguments, 130 interrupted"""


def _source(text: str) -> str:
    # Its path is filled in when its kind is known. An unset variable of the shell would mean the current folder.
    if not text:
        raise argparse.ArgumentTypeError("'' is given, expected is a path")
    return text


def _condition(text: str) -> str:
    try:
        return Condition(text).text
    except ConditionError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _new_path(text: str) -> str:
    if text.startswith("~"):  # hardly meant: the shell would have filled it in
        raise argparse.ArgumentTypeError(f"{text!r} is given, which begins with ~; write {os.path.expanduser(text)}")
    return location_argument(text)


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is given, allowed is a percentage of 0 to 100")
    return value


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments; `command` is "prepare" or one of `COMMANDS`.

    Raises:
        UsageError: they are wrong.
    """
    if argv and (command := argv[0]) in COMMANDS:
        return parser_of_set_command(command).parse_args(argv[1:], argparse.Namespace(command=command))
    return _prepare_parser().parse_args(argv, argparse.Namespace(command="prepare"))


def _prepare_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m data.prepare",
        usage="%(prog)s SOURCE --out DIR [options]\n       %(prog)s inspect|verify|push|pull|merge ...",
        description="Turn images into tar shards and an index for training.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=_source, metavar="SOURCE", help="where the images are, see below")
    parser.add_argument(
        "--out",
        required=True,
        type=_new_path,
        metavar="DIR",
        help="new or empty folder for the data set; --ray: or a URL",
    )
    parser.add_argument(
        "--size",
        type=whole_number(_MIN_SIZE, MAX_IMAGE_SIZE),
        help=f"height and width in pixels, {_MIN_SIZE} to {MAX_IMAGE_SIZE} (default: the source's)",
    )
    parser.add_argument(
        "--channels",
        type=whole_number(1, MAX_CHANNELS),
        metavar="N",
        help=f"1 grey or 3 RGB; of pairs also others up to {MAX_CHANNELS} (default: the source's)",
    )
    parser.add_argument(
        "--condition-channels",
        type=whole_number(1, MAX_CHANNELS),
        metavar="N",
        help=f"of pairs: channels of the conditions, 1 to {MAX_CHANNELS} (3)",
    )
    parser.add_argument(
        "--side-by-side",
        choices=get_args(Side),
        help="of pairs: each file holds both, and this half is the condition",
    )
    parser.add_argument(
        "--colour",
        choices=("srgb", "keep"),
        default="srgb",
        help="convert colour profiles to sRGB, or keep the stored numbers (srgb)",
    )
    parser.add_argument("--upscale", action="store_true", help="enlarge images that are smaller than --size")
    parser.add_argument(
        "--max-images", type=whole_number(1), metavar="N", help="take the first N images (stackedmnist: draw N)"
    )
    parser.add_argument(
        "--skip-images", type=whole_number(1), metavar="N", help="leave out the first N, to keep them for a test set"
    )
    parser.add_argument(
        "--classes",
        choices=("auto", "folders", "none"),
        default="auto",
        help="whether folders are classes: if that is clear (auto), each of them, or none",
    )
    parser.add_argument(
        "--split", metavar="NAME", help="part of a source that has several, such as train or test (train)"
    )
    parser.add_argument("--subset", metavar="NAME", help="of tables: part that Hugging Face calls subset or config")
    parser.add_argument("--column", metavar="NAME", help="of tables: column of the images, if several may hold them")
    parser.add_argument("--label", metavar="NAME", help="of tables: column of the labels, if several may hold them")
    filters = parser.add_argument_group(
        "filters, in the order in which they apply; the summary counts what each took away"
    )
    filters.add_argument(
        "--where",
        type=_condition,
        metavar="CONDITION",
        help="on columns in the .json members of WebDataset shards, such as 'punsafe < 0.1 and original_width >= 512'; "
        "images without a value are left out",
    )
    filters.add_argument(
        "--min-side", type=whole_number(1), metavar="PIXELS", help="of the short side of the original, at least"
    )
    filters.add_argument(
        "--max-aspect", type=aspect, metavar="RATIO", help="long side divided by short side of the original, at most"
    )
    filters.add_argument(
        "--dedup",
        choices=get_args(Dedup),
        help="take the first of equal files (exact), and of near-duplicates (perceptual)",
    )
    shards = parser.add_mutually_exclusive_group()
    shards.add_argument(
        "--shard-samples", type=whole_number(1), metavar="N", help=f"images of a shard ({_DEFAULT_SHARD_SAMPLES})"
    )
    shards.add_argument("--shard-mb", type=whole_number(1), metavar="N", help="or: its size in 10^6 bytes")
    parser.add_argument(
        "--workers",
        type=whole_number(0, MAX_WORKERS),
        metavar="N",
        help="processes that encode (default: by CPUs and images)",
    )
    parser.add_argument(
        "--ray",
        action="store_true",
        help="work on the Ray cluster in RAY_ADDRESS, or a local Ray; --out is a URL, or a folder that all nodes have",
    )
    parser.add_argument(
        "--seed", type=whole_number(0, 2**64 - 1), default=0, help="decides on the order of the samples"
    )
    parser.add_argument(
        "--max-bad", type=_percent, default=1.0, metavar="PERCENT", help="unusable images to leave out at most (1)"
    )
    return parser


def resolve_options(arguments: argparse.Namespace, source: Source) -> PrepareOptions:
    """Fill in the source's defaults."""
    size: int | None = arguments.size or source.defaults.size
    if size is None:
        raise UsageError(
            f"--size is missing: {source.description} has no default; give one of {_MIN_SIZE} or more, e.g. 64"
        )
    by_size: int | None = arguments.shard_mb
    return PrepareOptions(
        form=PreparedForm(
            size=size,
            channels=_channels(arguments, source),
            upscale=source.defaults.upscale or arguments.upscale,
            colour=arguments.colour,
            condition_channels=_condition_channels(arguments, source),
            condition_half=arguments.side_by_side,
        ),
        shard_samples=None if by_size else arguments.shard_samples or _DEFAULT_SHARD_SAMPLES,
        shard_mb=by_size,
        seed=arguments.seed,
        max_images=arguments.max_images,
        skip_images=arguments.skip_images,
        split=arguments.split,
        filters=Filters(
            where=arguments.where,
            min_side=arguments.min_side,
            max_aspect=arguments.max_aspect,
            dedup=arguments.dedup,
        ),
        max_bad_percent=arguments.max_bad,
        workers=default_workers(len(source.items)) if arguments.workers is None else arguments.workers,
    )


def _channels(arguments: argparse.Namespace, source: Source) -> int:
    asked: int | None = arguments.channels
    if asked is not None and asked not in PICTURE_CHANNELS:
        if not source.defaults.condition_channels:
            raise UsageError(
                f"--channels {asked} is given, but {source.description} has no conditions: other images than those of "
                "pairs have 1 or 3"
            )
        if arguments.side_by_side:
            raise UsageError(f"--channels {asked} is given; halves of image files have 1 or 3")
    return asked or source.defaults.channels


def _condition_channels(arguments: argparse.Namespace, source: Source) -> int:
    asked, default = arguments.condition_channels, source.defaults.condition_channels
    if asked and not default:
        raise UsageError(
            f"--condition-channels {asked} is given, but {source.description} has no conditions: pairs do, see "
            "python -m data.prepare --help"
        )
    if asked and arguments.side_by_side and asked not in PICTURE_CHANNELS:
        raise UsageError(f"--condition-channels {asked} is given; halves of image files have 1 or 3")
    return asked or default
