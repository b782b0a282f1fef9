"""Reads one LMDB for `lmdbs.py`, in a process of its own: LMDB ends its process where a damaged file surprises it.

Run as `python -P lmdb_reader.py FILE`. It answers requests on its standard input until that ends. A request is one byte
of `Request` and a payload, an answer one byte of `Answer` and a payload; eight bytes before each payload state its
length. The first answer comes without a request, when the file is open.
"""

import os
import resource
import signal
import struct
import sys
from typing import IO

import lmdb

LENGTH = struct.Struct("<Q")


class Request:
    """What a reader is asked; the payload in brackets."""

    KEYS = b"K"
    """All keys in the order of the database, or [number] of them: eight bytes of the number of entries that the
    database states, then each key after eight bytes of its length."""
    VALUE = b"V"
    """The value of [key]."""
    NAMED = b"N"
    """Whether [key] is a database of its own: one byte, 0 or 1."""


class Answer:
    """Kinds of answers."""

    DONE = b"+"
    """The payload is the result."""
    MISSING = b"0"
    """No such key."""
    FAULT = b"-"
    """The payload is the reason, as text."""


def read_message(stream: IO[bytes]) -> tuple[bytes, bytes] | None:
    """Kind and payload of the next message; None if the stream has ended."""
    head = stream.read(1 + LENGTH.size)
    if len(head) != 1 + LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head[1:])
    payload = stream.read(length)
    return (head[:1], payload) if len(payload) == length else None


def write_message(stream: IO[bytes], kind: bytes, payload: bytes = b"") -> None:
    """Write a message."""
    stream.write(kind + LENGTH.pack(len(payload)))
    stream.write(payload)
    stream.flush()


def main() -> None:
    """Answer requests on stdin."""
    # Ctrl-C is for the process that asks; it ends this one by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        environment = _open(sys.argv[1])
        write_message(answers, Answer.DONE)
    except (lmdb.Error, OSError) as error:
        write_message(answers, Answer.FAULT, str(error).encode())
        return
    num_bytes = os.stat(sys.argv[1]).st_size
    while message := read_message(requests):
        try:
            result = _answer(environment, *message, num_bytes)
            write_message(answers, Answer.MISSING if result is None else Answer.DONE, result or b"")
        except (lmdb.Error, MemoryError) as error:
            write_message(answers, Answer.FAULT, f"{type(error).__name__}: {error}".encode())


def _open(file: str) -> lmdb.Environment:
    # No locks, since the folder may be read-only; no read-ahead, since keys are read in shuffled order.
    environment = lmdb.open(file, subdir=False, readonly=True, lock=False, readahead=False, max_dbs=1)
    expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if (found := os.stat(file).st_size) < expected:
        # Reading past the end of a mapped file kills the process.
        raise lmdb.CorruptedError(f"has {found} bytes of {expected}; it is cut off")
    return environment


def _answer(environment: lmdb.Environment, request: bytes, payload: bytes, num_bytes: int) -> bytes | None:
    if request == Request.KEYS:
        return _keys(environment, int(payload) if payload else None)
    if request == Request.NAMED:
        try:
            environment.open_db(payload, create=False)
        except lmdb.Error:
            return b"\0"
        return b"\1"
    with environment.begin(buffers=True) as transaction:
        value = transaction.get(payload)
        if value is not None and len(value) > num_bytes:
            raise lmdb.CorruptedError(f"a value of {len(value)} bytes in a file of {num_bytes}")
        return None if value is None else bytes(value)


def _keys(environment: lmdb.Environment, max_keys: int | None) -> bytes:
    stated = environment.stat()["entries"]
    keys: list[bytes] = []
    are_numbers = True
    with environment.begin() as transaction:
        # Only keys, no sizes: lmdb reads all pages of a value that it returns, otherwise only the first.
        for key in transaction.cursor().iternext(keys=True, values=False):
            keys.append(key)
            # Numbers are sorted, for which all are needed. A damaged tree may be a circle.
            are_numbers = are_numbers and key.isdigit()
            if (len(keys) == max_keys and not are_numbers) or len(keys) > stated:
                break
    return LENGTH.pack(stated) + b"".join(LENGTH.pack(len(key)) + key for key in keys)


if __name__ == "__main__":
    main()
