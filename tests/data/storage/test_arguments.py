"""Whole numbers on the command line."""

import argparse

import pytest

from data.storage.arguments import ranges_of_whole_numbers, whole_number, whole_numbers


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("0008", 8), ("12", 12)])
def test_a_number_of_the_range_is_read(text: str, number: int) -> None:
    assert whole_number(1, 12)(text) == number


@pytest.mark.parametrize("text", ["0", "13", "-1", "1.0", "1e1", "one", "", " 1", "1_0", "\u0661", "9" * 5000])
def test_anything_else_is_refused_with_the_range(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is given, allowed is a whole number of 1 to 12$"):
        whole_number(1, 12)(text)


def test_a_range_may_be_open_and_below_zero() -> None:
    assert whole_number(-5)("-3") == -3
    with pytest.raises(argparse.ArgumentTypeError, match="'-6' is given, allowed is a whole number of -5 or more"):
        whole_number(-5)("-6")


def test_numbers_are_separated_by_commas() -> None:
    assert whole_numbers("3") == [3]
    assert whole_numbers("3,5,3") == [3, 5, 3]
    for text in ("", "3,", ",3", "3, 5", "a", "-1", "3;5"):
        with pytest.raises(argparse.ArgumentTypeError, match="allowed are whole numbers such as 3 or 3,5"):
            whole_numbers(text)


def test_ranges_of_whole_numbers_are_taken_in_their_order() -> None:
    assert ranges_of_whole_numbers("0-3,9,2-2") == [0, 1, 2, 3, 9, 2]
    assert ranges_of_whole_numbers(str(2**63 - 1)) == [2**63 - 1]


@pytest.mark.parametrize("text", ["", "3-", "-3", "5-3", "1,,2", "a", "1.5", "0-1000000", str(2**63), "9" * 30])
def test_what_is_no_range_of_whole_numbers_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="allowed are whole numbers and ranges of up to 1,000,000"):
        ranges_of_whole_numbers(text)
