"""Pickles made to exhaust memory or time: refused with work that their size bounds."""

import pickle
import tracemalloc

import pytest

from data.formats.cifar10_pickle import as_text, load_restricted

NESTED = b"(t" + b"".join(b"q%c(h%ch%ct" % (n, n, n) for n in range(60))
"""A tuple that holds the one before it twice, sixty times over: 2**60 parts if each were counted."""


@pytest.mark.parametrize(
    "content",
    [
        b"}" + NESTED + b"K\1s.",
        b"}(" + NESTED + b"K\1u.",
        b"(" + NESTED + b"K\1d.",
        b"\x8f(" + NESTED + b"\x90.",
        b"\x96" + (2**40).to_bytes(8, "little") + b".",
        b"c_codecs\nencode\n}b.",
        b"cnumpy\nndarray\n}b.",
    ],
    ids=["item", "items", "dict", "set", "byte array", "state of a function", "state of a class"],
)
def test_operations_without_a_bound_are_refused(content: bytes) -> None:
    with pytest.raises(pickle.UnpicklingError, match="it uses an operation that these files do not need"):
        load_restricted(content)


def test_number_in_the_table_of_repeated_objects_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        assert load_restricted(b"K\1r" + (2**31 - 1).to_bytes(4, "little") + b".") == 1
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_only_strings_become_text() -> None:
    assert [as_text(value) for value in (b"cat", "dog", load_restricted(NESTED + b"."))] == ["cat", "dog", "tuple"]


@pytest.mark.parametrize("length", [0, 3, 7, 20])
def test_pickle_that_is_cut_off_says_so(length: int) -> None:
    with pytest.raises(pickle.UnpicklingError, match="it is cut off"):
        load_restricted(b"\x80\2}q\0(U\4dataq\1K\1U\6labelsq\2K\2u."[:length])
