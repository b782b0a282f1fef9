"""Whole numbers on the command line: one parser for every command."""

import argparse
import re
from collections.abc import Callable

MAX_RANGE = 10**6
"""Most numbers in ranges together."""


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """A type for argparse: a whole number in [low, high], or of `low` or more."""
    allowed = f"a whole number of {low} or more" if high is None else f"a whole number of {low} to {high}"

    def parse(text: str) -> int:
        # The length is limited, because int() takes long for a million digits.
        if not re.fullmatch(r"-?[0-9]{1,20}", text) or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r} is given, allowed is {allowed}")
        return int(text)

    return parse


def ranges_of_whole_numbers(text: str) -> list[int]:
    """A type for argparse: whole numbers from 0 to 2**63 - 1 and ranges of them, such as 0-63,99."""
    allowed = f"{text!r} is given, allowed are whole numbers and ranges of up to {MAX_RANGE:,} of them, such as 0-63,99"
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,19})(?:-([0-9]{1,19}))?", part)
        if match is None:
            raise argparse.ArgumentTypeError(allowed)
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < 2**63 or last - first + len(found) >= MAX_RANGE:
            raise argparse.ArgumentTypeError(allowed)
        found += range(first, last + 1)
    return found


def whole_numbers(text: str) -> list[int]:
    """A type for argparse: whole numbers of 0 or more, separated by commas."""
    if not re.fullmatch(r"[0-9]{1,20}(,[0-9]{1,20})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is given, allowed are whole numbers such as 3 or 3,5")
    return [int(part) for part in text.split(",")]
