"""Hashes that tell states apart, part by part, and do not see who wrote them."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from trainer.checkpoint.fingerprint import Fingerprint, fingerprint
from trainer.checkpoint.format import list_checkpoints, rank_file
from trainer.checkpoint.part import HostMemory
from trainer.checkpoint.storage import FolderStorage
from trainer.checkpoint.writer import commit_parts
from trainer.engine.interface import Fragment

STATES = ("parameter", "exp_avg", "exp_avg_sq")
METRICS = {"loss_g": 0.5, "images_per_s": 100.0, "time/d_s": 0.1}


def state(cuts: tuple[int, ...], **changed: float) -> list[dict[str, list[Fragment]]]:
    """What each rank saves of ten elements, cut at `cuts`; `changed` names the states whose last element differs."""

    def piece(states: tuple[str, ...], start: int, stop: int) -> list[Fragment]:
        whole = {name: torch.arange(10.0) + len(name) for name in states}
        for name in states:
            whole[name][-1] += changed.get(name, 0.0)
        return [Fragment("layer.weight", start, {name: whole[name][start:stop] for name in states})]

    ends = [0, *cuts, 10]
    return [
        {"generator": piece(STATES, *ends[i : i + 2]), "ema": piece(("average",), *ends[i : i + 2])}
        for i in range(len(ends) - 1)
    ]


def hashed(
    folder: Path,
    ranks: list[dict[str, list[Fragment]]],
    *,
    loss: float = 1.0,
    buffer: float = 2.0,
    metrics: Mapping[str, float] = METRICS,
) -> Fingerprint:
    """The fingerprint of a checkpoint that these ranks wrote."""
    parts = {}
    for rank, sections in enumerate(ranks):
        extras = {"statistics": {"loss": torch.tensor(loss)}, "buffers": {"frequencies": torch.tensor([buffer])}}
        parts[rank_file(rank)] = HostMemory(torch.device("cpu")).take(sections, extras)
    manifest = {"format_version": 1, "step": 1, "world_size": len(ranks), "config": {}, "metrics": dict(metrics)}
    commit_parts(FolderStorage(folder), "step-00000001", parts, manifest)
    (checkpoint,) = list_checkpoints(folder)
    return fingerprint(checkpoint)


@pytest.mark.parametrize("cuts", [(5,), (1, 2), (3, 6, 9)])
def test_weights_average_and_optimizer_have_one_hash_for_any_number_of_ranks(tmp_path, cuts):
    one, several = hashed(tmp_path / "one", state(())), hashed(tmp_path / "several", state(cuts))
    assert one.differing(several) == ["metrics"]  # each rank has sums of its own


@pytest.mark.parametrize(
    ("name", "part"),
    [("parameter", "weights"), ("exp_avg", "optimizer"), ("exp_avg_sq", "optimizer"), ("average", "ema")],
)
def test_smallest_change_is_seen_in_its_part_alone(tmp_path, name, part):
    before = hashed(tmp_path / "before", state((4,)))
    assert before.differing(hashed(tmp_path / "same", state((4,)))) == []
    assert before.differing(hashed(tmp_path / "after", state((4,), **{name: 2.0**-19}))) == [part]


def test_sums_curves_and_buffers_count_and_the_speed_of_the_machine_does_not(tmp_path):
    before = hashed(tmp_path / "before", state(()))
    faster = METRICS | {"images_per_s": 200.0, "time/d_s": 0.05}
    assert before.differing(hashed(tmp_path / "faster", state(()), metrics=faster)) == []
    curve = METRICS | {"loss_g": 0.5000000000000001}
    assert before.differing(hashed(tmp_path / "curve", state(()), metrics=curve)) == ["metrics"]
    assert before.differing(hashed(tmp_path / "sum", state(()), loss=1.5)) == ["metrics"]
    assert before.differing(hashed(tmp_path / "buffer", state(()), buffer=2.5)) == ["weights"]
