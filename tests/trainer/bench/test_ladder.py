"""The rows of the table: what a version does not have is left out."""

from itertools import pairwise

from trainer.bench import ladder
from trainer.bench.ladder import Row, Rung, allowed, rows
from trainer.config.io import load_config


def test_every_row_is_a_config_and_adds_to_the_one_before():
    found = [row.overrides for row in rows() if row.overrides is not None]
    assert len(found) >= 3
    for before, after in pairwise(found):
        assert {word.partition("=")[0] for word in before} <= {word.partition("=")[0] for word in after}
        load_config("cifar10", after)


def test_setting_that_does_not_exist_makes_no_row(monkeypatch):
    table = (
        Rung("first", {"training.precision": ("fp32",), "engine.nothing": (False,)}, nchw=True),
        Rung("second", {"engine.nothing": (True,)}),
        Rung("third", {"engine.compile": ("on", True)}),
    )
    monkeypatch.setattr(ladder, "LADDER", table)
    assert rows() == [
        Row("first", ["training.precision=fp32"], nchw=True),
        Row("second", None),
        Row("third", ["training.precision=fp32", "engine.compile=true"]),
    ]


def test_values_are_those_of_the_type():
    assert allowed("training.precision", "bf16")
    assert not allowed("training.precision", "int3")
    assert not allowed("engine.compile", "on")
    assert not allowed("training.nothing", 1)
    assert allowed("data.loader_workers", 7)
