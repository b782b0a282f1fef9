"""Parameters that stand still: what they keep, what they do not have, and that the others learn as without them."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer.checkpoint.whole import trained_discriminator, trained_generator
from trainer.checkpoint.storage import find_checkpoint, storage_of_run
from trainer.engine.frozen import freeze, learning, standing_still
from trainer.rank.build import new_networks

PATTERNS = ("generator.down.*", "*.conv1.weight")
FREEZE = f"training.freeze=[{', '.join(PATTERNS)}]"
STEPS = 4
SHORT = (FREEZE, f"training.total_images={16 * STEPS}", "generator.num_res_blocks=1")


def zero(stage: int) -> tuple[str, ...]:
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
    with standing_still(network):
        assert not learning(network)
    assert learning(network) == [network.weight]


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """The directory of an undisturbed run with the plain torch engine."""
    directory = tmp_path_factory.mktemp("frozen") / "run"
    train(configure(tiny, directory, *SHORT))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_they_keep_their_bits_and_have_no_optimizer_state_with_any_engine(plain, tiny, tmp_path, stage):
    if stage is not None:
        train(configure(tiny, tmp_path, *SHORT, *zero(stage)))
    directory = plain if stage is None else tmp_path
    checkpoint = find_checkpoint(storage_of_run(directory), None)
    (averaged, config), (live, _) = trained_generator(checkpoint), trained_generator(checkpoint, "live")
    ends: dict[str, Any] = {"g": live, "d": trained_discriminator(checkpoint)}
    moved = set()
    for part, name in (("g", "generator"), ("d", "discriminator")):
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
    expected = state_of(plain, STEPS)
    for key, tensor in state_of(directory, STEPS).items():  # float32 sums in another order, as without frozen ones
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 2, 3])
def test_a_run_with_them_resumes_exactly(plain, tiny, tmp_path, stage):
    engine = () if stage is None else zero(stage)
    whole = plain
    if stage is not None:
        train(configure(tiny, whole := tmp_path / "whole", *SHORT, *engine))
    for driver in (Stopper(2), None):
        train(configure(tiny, tmp_path / "parts", *SHORT, *engine), driver)
    assert_same_state(state_of(tmp_path / "parts", STEPS), state_of(whole, STEPS))


@pytest.mark.slow
def test_each_stage_of_a_run_has_its_own(tiny, tmp_path):
    stage = "{denoiser: {images: 32, training: {objective: gaussian, freeze: [generator.up.*]}}}"
    train(configure(tiny, tmp_path, *SHORT, f"stages={stage}", "checkpoint.keep_last=9"))
    denoiser, game = storage_of_run(tmp_path).list()
    (before, config), (after, _) = trained_generator(denoiser), trained_generator(game)
    new = new_networks(config)["g"].state_dict()
    for name in new:
        if name.startswith("up."):
            assert torch.equal(before[name], new[name])
            assert torch.equal(after[name], new[name]) == name.endswith(".conv1.weight")
        if name.startswith("down."):
            assert torch.equal(after[name], before[name])
            assert not torch.equal(before[name], new[name])
