"""How a run settles `training.precision: auto`, records it and keeps it; and the layout of its weights."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer.checkpoint.storage import find_checkpoint, storage_of
from trainer.config.io import ConfigError, load_stored
from trainer.engine.precision import allow_tf32
from trainer.engine.ranks import Ranks
from trainer.rank import build as build_module
from trainer.rank.build import settle_precision


@dataclass
class MixedRanks:
    """The ranks of a group whose devices have these precisions."""

    precisions: Sequence[str]
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def gather(self, value: Any) -> Sequence[Any]:
        return self.precisions


@pytest.fixture(autouse=True)
def formats_are_put_back() -> Iterator[None]:
    yield
    allow_tf32(False)


def settled(config: Any, *precisions: str) -> str:
    return settle_precision(config, cast("Ranks", MixedRanks(precisions))).training.precision


@pytest.mark.parametrize(
    ("of_ranks", "precision"), [(("bf16", "bf16"), "bf16"), (("bf16", "fp32"), "fp32"), (("fp32",), "fp32")]
)
def test_auto_is_what_every_rank_has(tiny, tmp_path, of_ranks, precision, caplog):
    with caplog.at_level(logging.INFO):
        assert settled(configure(tiny, tmp_path), *of_ranks) == precision
    assert f"training.precision auto is {precision} on the CPU" in caplog.text


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_a_chosen_precision_stays_and_all_but_fp32_allow_tf32(tiny, tmp_path, precision, tf32):
    assert settled(configure(tiny, tmp_path, f"training.precision={precision}"), "fp32") == precision
    assert torch.backends.cuda.matmul.allow_tf32 is tf32
    assert torch.backends.cudnn.allow_tf32 is tf32


def test_a_run_records_what_auto_was_and_is_resumed_only_with_it(tiny, tmp_path, monkeypatch):
    config = configure(tiny, tmp_path)
    assert config.training.precision == "auto"
    monkeypatch.setattr(build_module, "best_precision", lambda device: "bf16")
    train(config, Stopper(2))
    manifest = find_checkpoint(storage_of(config), None).manifest
    assert manifest["config"]["training"]["precision"] == "bf16"
    assert load_stored(tmp_path / "config.yaml").training.precision == "bf16"

    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"training.precision: bf16 -> fp32 may not change .* it is what the device"):
        train(config)
    train(configure(tiny, tmp_path, "training.precision=bf16"), Stopper(2))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 0, 2])
def test_a_resumed_run_in_the_layout_of_a_gpu_equals_the_uninterrupted_one(tiny, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(build_module, "memory_format_of", lambda device: torch.channels_last)
    engine = [] if stage is None else ["engine.backend=deepspeed", f"engine.zero_stage_{{}}={stage}"]
    more = [setting.format(part) for setting in engine for part in ("g", "d")]
    whole, parts = (configure(tiny, tmp_path / name, *more) for name in ("whole", "parts"))
    train(whole)
    train(parts, Stopper(5))
    train(parts)
    assert_same_state(state_of(tmp_path / "whole", 10), state_of(tmp_path / "parts", 10))
