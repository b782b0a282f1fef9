"""Gradients are reduced during the backward pass and during G's forward pass, and no bit changes."""

import json
from pathlib import Path

import pytest
from torch import nn

from tests.launch import run_ranks
from trainer.engine.reduction import Reducer, in_buckets

SCRIPT = Path(__file__).parent / "processes" / "reduction_rank.py"


@pytest.mark.slow
@pytest.mark.multirank
def test_reduction_overlaps_with_ds_backward_and_gs_forward_and_changes_no_bit():
    done = run_ranks(2, [str(SCRIPT)])
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout[done.stdout.index("{") :])
    assert set(rows) == {"torch", "deepspeed"}
    for row in rows.values():
        assert row["same"], row
        assert row["reductions_d"] > 1, row
        assert row["first_starts_within_backward"], row
        assert row["backward_ops_after_first"] > 0, row
        assert row["last_ends_after_forward_began"], row


def test_buckets_hold_each_parameter_once_and_start_with_the_last():
    parameters = list(nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))).parameters())  # 36 and 12 bytes, in turn
    buckets = in_buckets(parameters, 60)
    assert [len(bucket) for bucket in buckets] == [3, 3, 2]
    assert [p for bucket in reversed(buckets) for p in bucket] == parameters
    assert in_buckets(parameters, float("inf")) == [parameters]


def test_one_rank_reduces_nothing():
    layer = nn.Linear(2, 2)
    reducer = Reducer(layer.parameters())
    reducer.expect()
    layer(layer.weight).sum().backward()
    reducer.launch_rest()
    assert not reducer.pending
