"""Arguments of the commands of `python -m data.prepare` for prepared data sets."""

import argparse
import os
from collections.abc import Callable
from typing import NoReturn

from data.storage.arguments import whole_number
from data.storage.errors import UserError
from data.storage.paths import location_argument

MAX_WORKERS = 1024
_IMAGES_WORTH_A_WORKER = 500
"""Starting a process takes about as long as a few hundred images."""
_TRANSFERS = 8
"""Files that are copied at a time."""
_SET = "folder or URL of a prepared data set"
_EXIT_CODES = "Exit codes: 0 all is well, 1 something is wrong, 2 wrong arguments, 130 interrupted."


class UsageError(UserError):
    """Wrong arguments; the message says what, where, what is allowed and what to do."""


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        raise UsageError(f"{message}; see {self.prog} --help")


def default_workers(num_images: int) -> int:
    """One process per CPU, fewer for few images; 0 instead of 1."""
    workers = min(len(os.sched_getaffinity(0)), num_images // _IMAGES_WORTH_A_WORKER)
    return 0 if workers <= 1 else workers


def parser_of(command: str) -> Parser:
    """The parser of one of `COMMANDS`."""
    parser = Parser(
        prog=f"python -m data.prepare {command}",
        allow_abbrev=False,
        epilog=f"{_EXIT_CODES} A folder called {command} is prepared as ./{command}.",
    )
    _ARGUMENTS[command](parser)
    return parser


def _inspect(parser: Parser) -> None:
    parser.description = "Print a summary of a prepared data set and write a contact sheet of 64 of its images."
    parser.add_argument("directory", type=location_argument, metavar="DIR", help=_SET)
    parser.add_argument(
        "--sheet",
        type=location_argument,
        metavar="FILE.png",
        help="where the sheet goes (contact-sheet-NAME.png, replaced)",
    )
    parser.add_argument(
        "--against",
        type=location_argument,
        metavar="DIR",
        help="look for near-duplicates in this data set, such as a test set, and draw them",
    )
    _add_workers(parser, "compare")


def _verify(parser: Parser) -> None:
    parser.description = "Hash every shard and decode every image of a prepared data set; name all that is wrong."
    parser.add_argument("directory", type=location_argument, metavar="DIR", help=_SET)
    _add_workers(parser, "decode")


def _push(parser: Parser) -> None:
    parser.description = (
        "Copy a prepared data set to a URL, and read back what arrived. Given again, it copies only what is missing or "
        "differs. index.json comes last: until then nobody takes the place for a data set."
    )
    parser.add_argument("directory", type=location_argument, metavar="DIR", help="folder of a prepared data set")
    parser.add_argument(
        "url", type=location_argument, metavar="URL", help="where it goes, such as s3://bucket/folder; new or empty"
    )
    _add_transfers(parser)
    parser.add_argument(
        "--check",
        choices=("hash", "size"),
        default="hash",
        help="compare what is at the URL by reading it all, or only its sizes (hash)",
    )


def _pull(parser: Parser) -> None:
    parser.description = (
        "Copy a prepared data set from a URL to a folder, and compare the hash of each file with its index.json. Given "
        "again, it copies only what is missing or differs."
    )
    parser.add_argument("url", type=location_argument, metavar="URL", help="of a prepared data set; http(s) as well")
    parser.add_argument("directory", type=location_argument, metavar="DIR", help="new or empty folder")
    _add_transfers(parser)


def _merge(parser: Parser) -> None:
    parser.description = (
        "Join prepared data sets of one size and one number of channels. Shards are linked, or copied to another disk; "
        "only those whose labels or keys change are written anew. Classes of one name become one class."
    )
    parser.add_argument(
        "directories", nargs="+", type=location_argument, metavar="DIR", help="folders of prepared data sets"
    )
    parser.add_argument("--out", required=True, type=location_argument, metavar="DIR", help="new or empty folder")


def _add_workers(parser: Parser, what: str) -> None:
    parser.add_argument(
        "--workers",
        type=whole_number(0, MAX_WORKERS),
        metavar="N",
        help=f"processes that {what} (default: by CPUs and images)",
    )


def _add_transfers(parser: Parser) -> None:
    parser.add_argument(
        "--workers",
        type=whole_number(1, 64),
        default=_TRANSFERS,
        metavar="N",
        help=f"files that are copied at a time ({_TRANSFERS})",
    )


_ARGUMENTS: dict[str, Callable[[Parser], None]] = {
    "inspect": _inspect,
    "verify": _verify,
    "push": _push,
    "pull": _pull,
    "merge": _merge,
}
COMMANDS = tuple(_ARGUMENTS)
"""The commands after `python -m data.prepare` that are about prepared data sets."""
