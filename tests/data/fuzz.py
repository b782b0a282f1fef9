"""Damages inputs at random, from a seed, and checks that a reader takes them or refuses them in its own words.

A test of the marker `fuzz` gives `fuzz` its good inputs and a function that reads one. Without `--fuzz-minutes` it
tries a fixed number of damaged inputs, so that it always fails or always passes; with it, as many as fit, from a seed
that a failure names.
"""

import copy
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from data.storage.errors import OperationError, UserError

REFUSALS: tuple[type[Exception], ...] = (UserError, OperationError)
"""What a reader may raise: `DataError`, `SourceError` and the others that end a command with a message."""
MAX_GROWTH_BYTES = 512 * 2**20
"""Memory that a test may take in addition to what it had: the inputs are small."""
MAX_CPU_S = 30.0
"""Processor time that one input may take, in this process: more counts as a hang."""
T = TypeVar("T")
_NUMBERS = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
_TEXTS = (
    b"",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"{",
    b"[[[[",
    b"\x1b[2J",
    b"../",
    b"\0",
    b"\xff\xfe",
    b"99999999999999999999",
)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    *(-1, 0, 1, 2, 3, 7, 64, 100, 10**6, 2**31, 2**53, 2**63, 2**64, 10**19, 10**40, -(2**63)),
    *(-1.0, 0.0, 0.5, 1e-300, 1e300, float("inf"), float("nan")),
    *("", "x", "-1", "1e999", "nan", "~", "$HOME", "../x", "/", "\0", "\x1b[2J", "\ud800", "é", "x" * 5000),
    *("file://[bad", "s3://user:pass word@host/x", "http://", "step-00000002", "2026-01-01T00:00:00Z"),
    *([], {}, [[]], [0], ["x"], [None], {"": 1}, {"x": None}, [1] * 1000),
)


def mutated(content: bytes, draws: random.Random) -> bytes:
    """Damage an input in one to four places, as failing disks, broken transfers, editors and attackers do."""
    damaged = bytearray(content)
    for _ in range(draws.choice([1, 1, 1, 2, 4])):
        place = draws.randrange(len(damaged) + 1)
        length = min(draws.choice([1, 2, 4, 8, 16, 64, 512, 4096]), len(damaged) - place)
        match draws.randrange(9):
            case 0 if damaged:
                damaged[place % len(damaged)] ^= 1 << draws.randrange(8)
            case 1 if damaged:
                damaged[place % len(damaged)] = draws.randrange(256)
            case 2:
                damaged[place : place + length] = bytes(length)
            case 3:
                del damaged[place : place + length]
            case 4:
                damaged[place:place] = damaged[place : place + length]
            case 5:
                del damaged[place:]
            case 6:
                width = draws.choice([1, 2, 4, 8])
                number = draws.choice(_NUMBERS) % 2 ** (8 * width)
                damaged[place : place + width] = number.to_bytes(width, draws.choice(["little", "big"]))
            case 7:
                damaged[place : place + draws.choice([0, length])] = draws.choice(_TEXTS)
            case _:
                other = draws.randrange(len(damaged) + 1)
                damaged[place : place + length] = damaged[other : other + length]
    return bytes(damaged)


def altered(content: Any, draws: random.Random) -> Any:
    """Change a JSON-like value in one to three places: other values, keys lost, renamed or moved, types mixed up."""
    root = [copy.deepcopy(content)]
    for _ in range(draws.choice([1, 1, 1, 2, 3])):
        places = list(_places(root))
        holder, key = draws.choice(places)
        other_holder, other_key = draws.choice(places)
        match draws.randrange(6):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(draws.choice(_VALUES))
            case 3 if holder is not root:
                del holder[key]
            case 4 if isinstance(holder, dict):
                holder[draws.choice(["", "x", "\0", "é", str(other_key)])] = holder.pop(key)
            case _:
                holder[key] = copy.deepcopy(other_holder[other_key])
    return root[0]


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Each value in a JSON-like value, at any depth, as the dict or list that holds it and its key or index."""
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


class HangError(BaseException):
    """An input took too long. Not an Exception, so that no reader takes it for damage."""


@contextmanager
def _limited_time() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise HangError(f"more than {MAX_CPU_S:g} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(
    config: pytest.Config,
    inputs: Sequence[T],
    read: Callable[[T], None],
    *,
    damage: Callable[[T, random.Random], T] = mutated,
    num_inputs: int = 200,
    refusals: tuple[type[Exception], ...] = REFUSALS,
) -> int:
    """Read damaged inputs.

    Args:
        config: for `--fuzz-minutes`.
        inputs: good ones.
        read: reads one, and checks the result as far as it can.
        damage: makes a damaged input from a good one: `mutated` for bytes, `altered` for JSON-like values.
        num_inputs: how many are tried without `--fuzz-minutes`.
        refusals: the only exceptions that `read` may raise.

    Returns:
        How many inputs were tried.
    """
    minutes = config.getoption("--fuzz-minutes")
    seed = 0 if minutes is None else time.time_ns()
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    for good in inputs:
        read(good)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tried = 0
    while tried < num_inputs if deadline is None else time.monotonic() < deadline:
        # Each input has its own generator, so that a failure can be repeated alone.
        draws = random.Random(f"{seed}-{tried}")
        damaged = damage(draws.choice(inputs), draws)
        try:
            with _limited_time():
                read(damaged)
        except refusals as refusal:
            controls = [c for c in str(refusal) if not c.isprintable() and c != "\n"]
            assert not controls, f"input {seed}-{tried}: the refusal has control characters: {str(refusal)!r}"
        except BaseException as error:
            error.add_note(f"input {seed}-{tried}: {damaged!r:.2000}")
            raise
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert grown < MAX_GROWTH_BYTES, f"input {seed}-{tried} took {grown} bytes of memory"
        tried += 1
    return tried
