"""How a run settles `training.precision: auto`, records it and keeps it; and the layout of its weights."""

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from tests.data.buckets import bucket
from tests.launch import run_ranks
from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer.checkpoint.snapshot import WeightsError, load_snapshot
from trainer.checkpoint.storage import find_checkpoint, storage_of, storage_of_run
from trainer.checkpoint.whole import trained_discriminator, trained_generator
from trainer.config.draft import ConfigError
from trainer.config.io import load_stored
from trainer.engine.precision import allow_tf32
from trainer.engine.ranks import Ranks
from trainer.export.command import export
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_game_starts_as_the_denoiser_it_comes_from_whatever_z_and_then_learns_to_use_z(tiny, tmp_path):
    embedded = ("generator.time_embedding=log_sigma", "generator.output_tanh=false", "generator.sigma_data=0.5")
    gaussian = ("training.objective=gaussian", "training.noise.kind=log_normal", "training.total_images=48")
    train(configure(tiny, tmp_path / "denoiser", *embedded, *gaussian))
    (weights,) = (tmp_path / "denoiser" / "snapshots").glob("*/generator.safetensors")
    denoiser, _ = load_snapshot(weights.parent)
    # Other steps than the denoiser's, which saw none.
    levels = ("diffusion.schedule=levels", "diffusion.num_timesteps=2", "diffusion.levels=[0.8, 40]")
    config = configure(tiny, tmp_path / "game", *embedded, *levels, f"run.init_from={weights}")
    ranks = Ranks.join("cpu", 60)
    try:
        learner = build_module.build(settle_precision(config, ranks), ranks)
        generator, x_t = learner.players.generator.module, torch.randn(4, 1, 8, 8)
        z, sigma = torch.randn(2, 4, 8), torch.tensor([0.8, 40.0, 0.8, 40.0])
        with torch.no_grad():
            expected = denoiser(x_t, sigma, torch.zeros(4, 8))
            for drawn in z:
                torch.testing.assert_close(generator(x_t, torch.tensor([0, 1, 0, 1]), drawn), expected)
        learner.close()
    finally:
        ranks.leave()
    train(config)
    played, _ = load_snapshot(next((tmp_path / "game" / "snapshots").iterdir()))
    with torch.no_grad():
        first, second = (played(x_t, torch.tensor([0, 1, 0, 1]), drawn) for drawn in z)
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_a_run_starts_both_networks_from_another_run_or_from_its_export(tiny, tmp_path):
    first = tmp_path / "first"
    train(configure(tiny, first, "training.total_images=32", "generator.num_res_blocks=1"))
    export(first, None, tmp_path / "model", forms=("diffusers",), discriminator=True)
    assert (tmp_path / "model" / "discriminator.safetensors").is_file()
    (checkpoint,) = storage_of_run(first).list()
    expected: dict[str, Any] = {"g": trained_generator(checkpoint)[0], "d": trained_discriminator(checkpoint)}

    def started(*sets: str) -> dict[str, Any]:
        ranks = Ranks.join("cpu", 60)
        try:
            config = configure(tiny, tmp_path / "second", "generator.num_res_blocks=1", "run.seed=5", *sets)
            learner = build_module.build(settle_precision(config, ranks), ranks)
            states = {part: engine.module.state_dict() for part, engine in learner.players.engines.items()}
            learner.close()
            return states
        finally:
            ranks.leave()

    def equal(states: dict[str, Any], part: str) -> bool:
        return all(torch.equal(states[part][name], tensor) for name, tensor in expected[part].items())

    for source in (first, tmp_path / "model"):
        states = started(f"run.init_from={source}")
        assert equal(states, "g") and equal(states, "d")
        states = started(f"run.init_from={source}", "run.init_from_discriminator=false")
        assert equal(states, "g") and not equal(states, "d")
        states = started(
            f"run.init_from={source}", "run.init_from_discriminator=false", "discriminator.base_channels=8"
        )
        assert equal(states, "g")
        with pytest.raises(WeightsError, match="to false for a new one"):
            started(f"run.init_from={source}", "discriminator.base_channels=8")
        states = started(f"run.init_from={source}", "discriminator.init_from=generator")
        assert equal(states, "g") and not equal(states, "d")
        assert torch.equal(states["d"]["blocks.0.conv1.weight"], expected["g"]["down.0.blocks.0.conv1.weight"])
    states = started(f"run.init_from={tmp_path / 'model' / 'generator.safetensors'}")
    assert equal(states, "g") and not equal(states, "d")


@pytest.mark.slow
@pytest.mark.multirank
def test_ranks_of_a_host_download_the_checkpoint_that_they_start_from_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    more = ("training.total_images=32", "generator.num_res_blocks=1")
    with bucket("training", monkeypatch) as filesystem:
        train(configure(tiny, tmp_path / "first", *more, "checkpoint.directory=s3://training/first"))
        sets = [*tiny, *more, f"run.directory={tmp_path / 'second'}", f"run.init_from={tmp_path / 'first'}"]
        line = ["-m", "tests.trainer.rank.processes.starts_from_bucket", *sets, "scaling.world_size=2"]
        done = run_ranks(2, line)
        assert done.returncode == 0, done.stderr
        (number, first, error), (others, second, other_error) = json.loads(done.stdout)
        assert (number, others) == (1, 0)  # one rank wrote one part
        assert (error, other_error) == ("", "")
        assert first == second
        assert not list(tmp_path.glob("ddgan-checkpoints-*/*"))
        # A checkpoint that is gone since the start was checked ends both ranks at once.
        filesystem.rm("training/first", recursive=True)
        done = run_ranks(2, line)
        (_, _, error), (_, _, other_error) = json.loads(done.stdout)
        assert error == other_error == "s3://training/first holds no valid checkpoint yet"


@pytest.mark.slow
def test_a_run_that_recomputes_its_blocks_ends_as_one_that_keeps_them(tiny, tmp_path):
    sets = ("generator.dropout=0.2", "training.total_images=48", "training.r1_interval_steps=1", "training.r2_gamma=1")
    sets += ("engine.backend=deepspeed", "engine.zero_stage_g=2", "engine.zero_stage_d=2")
    for name, recomputes in (("keeps", "false"), ("recomputes", "true")):
        train(configure(tiny, tmp_path / name, *sets, f"engine.checkpoint_activations={recomputes}"))
    assert_same_state(state_of(tmp_path / "recomputes", 3), state_of(tmp_path / "keeps", 3))


def test_the_game_knows_whether_the_discriminator_sees_x_t_and_says_that_there_is_no_z(tiny, tmp_path, caplog):
    ranks = Ranks.join("cpu", 60)
    try:
        for sees in ("pair", "marginal"):
            sets = (f"discriminator.sees={sees}", "training.transport=1", "generator.latent=false")
            with caplog.at_level(logging.INFO):
                learner = build_module.build(settle_precision(configure(tiny, tmp_path, *sets), ranks), ranks)
            assert learner.players.sees_x_t == (sees == "pair")
            learner.close()
    finally:
        ranks.leave()
    assert "generator.latent is false: the generator gets zeros instead of z" in caplog.text


def test_weights_of_a_game_keep_the_latent_they_have_learned_with(tiny, tmp_path):
    train(configure(tiny, tmp_path / "first", "training.total_images=32"))
    (weights,) = (tmp_path / "first" / "snapshots").glob("*/generator.safetensors")
    ranks = Ranks.join("cpu", 60)
    try:
        config = settle_precision(configure(tiny, tmp_path / "second", f"run.init_from={weights}"), ranks)
        learner = build_module.build(config, ranks)
        state, saved = learner.players.generator.module.state_dict(), load_file(weights)
        learner.close()
    finally:
        ranks.leave()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
