"""Frozen parameters: what they keep, what they do not have, and that the others learn as without them."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer.algorithm.method import PART_NAMES
from trainer.checkpoint.storage import find_checkpoint, storage_of_run
from trainer.checkpoint.whole import trained_discriminator, trained_generator
from trainer.engine.frozen import all_frozen, freeze, learning
from trainer.rank.build import new_networks

FREEZE = "training.freeze=[generator.down.*, '*.conv1.weight']"
STEPS = 4
SHORT = (FREEZE, f"training.total_images={16 * STEPS}", "generator.num_res_blocks=1")


def zero(stage: int | None) -> tuple[str, ...]:
    if stage is None:
        return ()
    # Exact R1 allows at most stage 2 for the discriminator.
    return ("engine.backend=deepspeed", f"engine.zero_stage_g={stage}", f"engine.zero_stage_d={min(stage, 2)}")


def still(name: str) -> bool:
    return name.startswith("generator.down.") or name.endswith(".conv1.weight")


def test_patterns_name_parameters_of_their_network_and_stars_span_dots():
    network = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "deep": nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)})})
    freeze(network, "generator", ["generator.*conv.weight", "discriminator.*"])
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["conv.bias", "deep.conv.bias"]


def test_what_stood_still_before_stands_still_afterwards():
    network = nn.Linear(2, 2)
    freeze(network, "discriminator", ["discriminator.bias"])
    with all_frozen(network):
        assert not learning(network)
    assert learning(network) == [network.weight]


@pytest.fixture(scope="module")
def ended(tiny, tmp_path_factory):
    """The directory of an undisturbed run at a ZeRO stage; None: with the plain torch engine."""

    @cache
    def run(stage: int | None) -> Path:
        directory = tmp_path_factory.mktemp("frozen") / "run"
        train(configure(tiny, directory, *SHORT, *zero(stage)))
        return directory

    return run


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 0, 2, 3])
def test_they_keep_their_bits_and_have_no_optimizer_state_with_any_engine(ended, stage):
    directory = ended(stage)
    checkpoint = find_checkpoint(storage_of_run(directory), None)
    (averaged, config), (live, _) = trained_generator(checkpoint), trained_generator(checkpoint, "live")
    ends: dict[str, Any] = {"g": live, "d": trained_discriminator(checkpoint)}
    moved = set()
    for part, name in PART_NAMES.items():
        for parameter, p in new_networks(config)[part].named_parameters():
            has_state = {f"{name}/{moment}/{parameter}" for moment in ("exp_avg", "exp_avg_sq")}
            found = has_state & checkpoint.section(name).lengths().keys()
            if still(f"{name}.{parameter}"):
                assert torch.equal(ends[part][parameter], p) and not found
                assert part == "d" or torch.equal(averaged[parameter], p)
            else:
                assert found == has_state
                moved |= set() if torch.equal(ends[part][parameter], p) else {part}
    assert moved == {"g", "d"}
    expected = state_of(ended(None), STEPS)
    for key, tensor in state_of(directory, STEPS).items():  # float32 sums in another order, as without frozen ones
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 3])
def test_a_run_with_them_resumes_exactly(ended, tiny, tmp_path, stage):
    for driver in (Stopper(2), None):
        train(configure(tiny, tmp_path, *SHORT, *zero(stage)), driver)
    assert_same_state(state_of(tmp_path, STEPS), state_of(ended(stage), STEPS))


@pytest.mark.slow
def test_each_stage_of_a_run_has_its_own(tiny, tmp_path):
    stage = "{denoiser: {images: 32, training: {objective: gaussian, freeze: [generator.up.*]}}}"
    train(configure(tiny, tmp_path, *SHORT, f"stages={stage}", "checkpoint.keep_last=9"))
    denoiser, game = storage_of_run(tmp_path).list()
    (before, config), (after, _) = trained_generator(denoiser), trained_generator(game)
    new = new_networks(config)["g"].state_dict()
    moved = {
        when: {name for name in new if not torch.equal(left[name], right[name])}
        for when, left, right in (("denoiser", new, before), ("game", before, after))
    }
    assert "down.0.blocks.0.conv2.weight" in moved["denoiser"] and "up.0.blocks.0.conv2.weight" in moved["game"]
    assert not any(name.startswith("up.") for name in moved["denoiser"])
    assert not any(still(f"generator.{name}") for name in moved["game"])
