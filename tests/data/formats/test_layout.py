"""Subsets and splits are told by the names of files, as the Hub tells them."""

import pytest

from data.formats.layout import Part, note_on, parts_of, select
from data.formats.tables import TableError


@pytest.mark.parametrize(
    ("name", "subset", "split"),
    [
        ("data/train-00000-of-00002.parquet", "", "train"),
        ("train-00001-of-00002-a1b2c3.parquet", "", "train"),
        ("data/held_out-00000-of-00001.parquet", "", "held_out"),
        ("full/val-00000-of-00001.parquet", "full", "val"),
        ("data/full/test-00000-of-00001.parquet", "full", "test"),
        ("default/train/0000.parquet", "default", "train"),
        ("validation.parquet", "", "validation"),
        ("my_eval_set.parquet", "", "test"),
        ("en/dev/part.arrow", "en", "validation"),
    ],
)
def test_name_of_a_file_tells_its_part(name: str, subset: str, split: str) -> None:
    assert parts_of([name]) == {Part(subset, split): [name]}


@pytest.mark.parametrize("names", [["a.parquet", "b.parquet"], ["b.parquet", "a.parquet", "train.parquet"]])
def test_names_that_do_not_all_tell_a_split_are_one_part(names: list[str]) -> None:
    assert parts_of(names) == {Part("", ""): sorted(names)}
    with pytest.raises(TableError, match="--split train is given, but it has no splits; leave it out"):
        select(parts_of(names), subset=None, split="train")


def test_usual_part_is_taken_and_others_only_when_they_are_named() -> None:
    files = {
        Part(*part): [f"{part}"] for part in (("default", "train"), ("default", "test"), ("raw", "a"), ("raw", "b"))
    }
    part, _ = select(files, subset=None, split=None)
    assert part == Part("default", "train")
    assert note_on(part, files) == ", subset default of default, raw, split train of test, train"
    assert select(files, subset="raw", split="b")[0] == Part("raw", "b")
    with pytest.raises(TableError, match="has several splits; say which one with --split NAME: a, b"):
        select(files, subset="raw", split=None)
    with pytest.raises(TableError, match="--subset is x, but its subsets are: default, raw"):
        select(files, subset="x", split=None)
