"""The place of a rank in its group, from torchrun's environment variables or from what others have left of them."""

import os

import pytest

from trainer.config.command_line import check_group
from trainer.config.draft import ConfigError

ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "4711"}


@pytest.mark.parametrize(
    ("variables", "place"),
    [({}, (0, 1)), (ADDRESS, (0, 1)), ({"RANK": "1", "WORLD_SIZE": "2", **ADDRESS}, (1, 2))],
)
def test_place_is_that_of_torchrun_or_the_only_one(monkeypatch, variables, place):
    monkeypatch.setattr(os, "environ", variables)
    assert check_group() == place


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "8"}, "the environment has WORLD_SIZE=8, but RANK, MASTER_ADDR, MASTER_PORT is not set. Start"),
        ({"RANK": "3", **ADDRESS}, "the environment has RANK=3, but WORLD_SIZE is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", **ADDRESS}, "but that is no rank of a group"),
        ({"RANK": "x", "WORLD_SIZE": "2", **ADDRESS}, "but that is no rank of a group"),
    ],
)
def test_variables_that_others_have_left_are_refused(monkeypatch, variables, message):
    monkeypatch.setattr(os, "environ", variables)
    with pytest.raises(ConfigError) as caught:
        check_group()
    assert message in str(caught.value)
    assert str(caught.value).endswith("for a single rank: unset RANK WORLD_SIZE LOCAL_RANK")
