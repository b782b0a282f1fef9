"""A rank's life: what a stop, a kill, damage and a second start leave behind."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.storage.location import DataError
from tests.launch import ROOT, environment, run_python
from tests.trainer.runs import Recorder, Stopper, assert_same_state, configure, damaged_copy, state_of, train
from trainer.checkpoint.format import CheckpointError, list_checkpoints
from trainer.checkpoint.storage import FolderStorage
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.command_line import check_data
from trainer.config.draft import ConfigError
from trainer.config.io import load_config
from trainer.engine.ranks import Ranks
from trainer.rank import run_checkpoints
from trainer.rank.worker import Worker, run_rank
from trainer.tracking.spool import read_records, spool_path


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory) -> tuple[Path, Recorder]:
    directory = tmp_path_factory.mktemp("straight")
    outcome, recorder = train(configure(tiny, directory))
    assert outcome.finished
    return directory, recorder


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 4, 5, 9])
def test_stopped_and_resumed_run_equals_uninterrupted_run(tiny, tmp_path, straight, stop_at):
    config = configure(tiny, tmp_path)
    stopped, before = train(config, Stopper(stop_at))
    assert (stopped.finished, stopped.step) == (False, stop_at)
    resumed, after = train(config)
    assert (resumed.finished, resumed.step) == (True, 10)
    assert_same_state(state_of(tmp_path, 10), state_of(straight[0], 10))

    measured = ("time/", "images_per_s", "peak_memory", "step_time", "system/")  # of the machine, not of the run
    curves = before.metrics | after.metrics
    assert before.metrics.keys().isdisjoint(after.metrics)
    assert curves.keys() == straight[1].metrics.keys() == {4, 8, 10}
    for step, metrics in straight[1].metrics.items():
        for name in (name for name in metrics if not name.startswith(measured)):
            assert curves[step][name] == metrics[name], (step, name)


def test_a_stop_on_a_saved_step_does_not_write_its_checkpoint_again(tiny, tmp_path, monkeypatch):
    saved: list[int] = []

    def counting(writer: CheckpointWriter, step: int, *rest: Any) -> None:
        saved.append(step)
        save(writer, step, *rest)

    save = CheckpointWriter.save
    monkeypatch.setattr(CheckpointWriter, "save", counting)
    train(configure(tiny, tmp_path, "checkpoint.save_interval_steps=3"), Stopper(6))
    assert saved == [3, 6]


@pytest.mark.slow
def test_dropout_masks_are_the_same_after_a_restart(tiny, tmp_path):
    whole, parts = (configure(tiny, tmp_path / name, "generator.dropout=0.5") for name in ("whole", "parts"))
    train(whole)
    train(parts, Stopper(4))
    torch.manual_seed(99)
    train(parts)
    assert_same_state(state_of(tmp_path / "parts", 10), state_of(tmp_path / "whole", 10))


@pytest.mark.slow
def test_means_are_over_the_steps_since_the_last_point_when_a_finished_run_is_extended(tiny, tmp_path):
    more = ("training.learning_rate_g.decay=constant", "training.learning_rate_d.decay=constant")
    train(configure(tiny, tmp_path / "longer", *more, "training.total_images=96"))  # 6 steps: points at 4 and 6
    _, extended = train(configure(tiny, tmp_path / "longer", *more, "training.total_images=128"))
    _, straight = train(configure(tiny, tmp_path / "straight", *more, "tracking.log_interval_steps=1"))
    expected = sum(straight.metrics[step]["loss_g"] for step in (7, 8)) / 2
    assert extended.metrics[8]["loss_g"] == pytest.approx(expected, rel=1e-6)


def test_password_of_the_tracking_server_is_in_no_file_of_the_run(tiny, tmp_path):
    train(configure(tiny, tmp_path, "training.total_images=16", "tracking.uri=https://user:pa55w0rd@host"))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) >= 5
    assert not [p for p in files if b"pa55w0rd" in p.read_bytes()]


def test_curves_have_what_a_reader_needs(straight):
    metrics = straight[1].metrics[8]
    names = {"loss_d_real", "loss_d_fake", "loss_g", "r1", "gradient_norm_g", "gradient_norm_d", "learning_rate_g"}
    names |= {"learning_rate_d", "images_seen", "images_per_s", "peak_memory_gib", "replaced_samples"}
    names |= {"skipped_updates_g", "skipped_updates_d", "checkpoint_failures"}
    names |= {f"time/{part}_s" for part in ("data", "d", "g", "other")}
    names |= {f"logit_{kind}/t{t}" for kind in ("real", "fake") for t in range(4)}
    names |= {"step_time_s", "step_time_slowest_s", "step_time_slowest_rank"}
    names |= {f"system/node-0/{name}" for name in ("cpu_percent", "memory_gib", "disk_free_gib")}
    assert names == metrics.keys()
    assert metrics["images_seen"] == 8 * 16
    assert metrics["gradient_norm_g"] > 0


def test_finished_run_is_left_alone_by_a_second_start(tiny, tmp_path):
    config = configure(tiny, tmp_path, "training.total_images=32")
    first, _ = train(config)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    second, recorder = train(config)
    assert second == first
    assert recorder.metrics == {}
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated shard", "flipped byte", "missing shard", "half a manifest"])
def test_damaged_checkpoint_is_named_and_the_one_before_is_used(tiny, tmp_path, straight, caplog, damage):
    config = configure(tiny, tmp_path, "checkpoint.save_interval_steps=3")
    train(config, Stopper(8))
    newest = tmp_path / "checkpoints" / "step-00000008"
    (shard,), manifest = newest.glob("rank-00000-*.safetensors"), newest / "manifest.json"
    if damage == "truncated shard":
        os.truncate(shard, shard.stat().st_size // 2)
    elif damage == "flipped byte":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "missing shard":
        shard.unlink()
    else:
        os.truncate(manifest, manifest.stat().st_size // 2)
    outcome, _ = train(config)
    assert outcome.finished
    assert "passing over" in caplog.text
    assert "step-00000008" in caplog.text
    assert_same_state(state_of(tmp_path, 10), state_of(straight[0], 10))


@pytest.mark.slow
def test_only_the_newest_checkpoints_stay(tiny, tmp_path):
    train(configure(tiny, tmp_path, "checkpoint.save_interval_steps=2", "checkpoint.keep_last=3"))
    assert [c.step for c in list_checkpoints(tmp_path / "checkpoints")] == [6, 8, 10]


@pytest.mark.slow
def test_best_checkpoint_by_a_curve_stays(tiny, tmp_path):
    more = ("checkpoint.save_interval_steps=2", "checkpoint.keep_last=1", "tracking.log_interval_steps=2")
    _, recorder = train(configure(tiny, tmp_path, *more, "checkpoint.keep_best=loss_g", "training.total_images=144"))
    best = min((2, 4, 6, 8, 9), key=lambda step: recorder.metrics[step]["loss_g"])
    assert {c.step for c in list_checkpoints(tmp_path / "checkpoints")} == {best, 9}


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 10])
def test_failed_save_is_counted_and_only_that_of_the_end_ends_the_run(tiny, tmp_path, monkeypatch, at):
    def commit(storage: FolderStorage, checkpoint: str, manifest: bytes) -> None:
        if checkpoint == f"step-{at:08d}":
            raise OSError(errno.EIO, "Input/output error")
        real(storage, checkpoint, manifest)

    real = FolderStorage.commit
    monkeypatch.setattr(FolderStorage, "commit", commit)
    monkeypatch.setattr(run_checkpoints, "CheckpointWriter", partial(CheckpointWriter, pauses_s=(0.0,)))
    config = configure(tiny, tmp_path, "checkpoint.save_interval_steps=2", "checkpoint.keep_last=9")
    if at == 10:
        with pytest.raises(CheckpointError, match=r"checkpoint of step 10 was not saved: .*Input/output error"):
            train(config)
    else:
        _, recorder = train(config)
        assert sum(metrics["checkpoint_failures"] for metrics in recorder.metrics.values()) == 1
    assert [c.step for c in list_checkpoints(tmp_path / "checkpoints")] == [s for s in (2, 4, 6, 8, 10) if s != at]
    assert not (tmp_path / "lease.json").exists()


def test_manifest_says_what_the_run_was(tiny, tmp_path, straight):
    manifest = json.loads((straight[0] / "checkpoints" / "step-00000010" / "manifest.json").read_text())
    assert manifest["step"] == 10
    assert manifest["images"] == 160
    assert manifest["cursor"] == {"batch": 10}
    assert manifest["config"]["training"]["global_batch_size"] == 16
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["zero_stages"] == {"g": 0, "d": 0}
    assert manifest["metrics"]["loss_g"] == straight[1].metrics[10]["loss_g"]
    assert [re.sub(r"-[0-9a-f]{8}\.", ".", name) for name in manifest["files"]] == ["rank-00000.safetensors"]


def test_resume_with_another_seed_is_refused(tiny, tmp_path):
    train(configure(tiny, tmp_path), Stopper(2))
    with pytest.raises(ConfigError, match=r"run\.seed.*may not change"):
        train(configure(tiny, tmp_path, "run.seed=1"))


def test_images_of_another_size_are_refused_before_the_start(tiny, tmp_path):
    config = configure(tiny, tmp_path, "data.image_size=16", "generator.attention_resolutions=[8]")
    with pytest.raises(
        DataError, match=r"data\.image_size is 16, but .* was prepared with 8: set data\.image_size to 8"
    ):
        check_data(config)


def test_weights_of_a_snapshot_start_a_new_run(tiny, tmp_path, straight):
    weights = straight[0] / "snapshots" / "step-00000010" / "generator.safetensors"
    config = configure(tiny, tmp_path, f"run.init_from={weights}")
    ranks = Ranks.join("cpu", 60)
    try:
        worker = Worker(config, ranks, Stopper())
    finally:
        ranks.leave()
    expected = load_file(weights)
    for name, parameter in worker.learner.players.generator.module.named_parameters():
        assert torch.equal(parameter, expected[name])


def test_run_rank_leaves_no_group_behind(tiny, tmp_path):
    assert run_rank(configure(tiny, tmp_path, "training.total_images=16"), Stopper()).finished
    assert not torch.distributed.is_initialized()


def _worker(tiny: Sequence[str], directory: Path, *more: str) -> list[str]:
    overrides = [*tiny, f"run.directory={directory}", *more]
    return ["-m", "trainer.worker", "--config", "digits", *(x for o in overrides for x in ("--set", o))]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_a_checkpoint(tiny, tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, *_worker(tiny, tmp_path, "training.total_images=1_000_000", "engine.backend=torch")],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    while not (tmp_path / "config.yaml").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)  # the grace that clusters give
    assert process.returncode == 0, stderr
    (checkpoint,) = list_checkpoints(tmp_path / "checkpoints")
    checkpoint.verify()
    assert f"stopped at step {checkpoint.step}" in stderr


@pytest.mark.slow
def test_tracking_server_that_is_gone_for_the_whole_run_costs_no_point(tiny, tmp_path):
    more = ("engine.backend=torch", "tracking.backends=[mlflow]", "tracking.uri=http://127.0.0.1:9")
    done = run_python([*_worker(tiny, tmp_path, *more, "tracking.flush_timeout_s=1")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "They are safe in" in done.stderr and "trainer.tracking deliver --run" in done.stderr
    points = [record.step for record in read_records(spool_path(tmp_path)) if record.kind == "metrics"]
    assert points == [4, 8, 10]
    assert [c.step for c in list_checkpoints(tmp_path / "checkpoints")] == [10]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_resumed_run_on_a_gpu_equals_the_uninterrupted_one(tiny, tmp_path, precision):
    more = ["scaling.device=gpu", "run.deterministic=true", f"training.precision={precision}"]
    arguments = {name: _worker(tiny, tmp_path / name, *more) for name in ("straight", "stopped")}
    script = (
        "import sys\n"
        "from tests.trainer.runs import Stopper\n"
        "from trainer.config.io import load_config\n"
        "from trainer.worker import run_rank\n"
        "stop, *sets = sys.argv[1:]\n"
        "run_rank(load_config('digits', [*sets, 'scaling.world_size=1']), Stopper(int(stop) or None))\n"
    )
    for name, stop in (("straight", "0"), ("stopped", "5"), ("stopped", "0")):
        sets = [word for word in arguments[name][4:] if word != "--set"]
        done = run_python(["-c", script, stop, *sets])
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same_state(state_of(tmp_path / "stopped", 10), state_of(tmp_path / "straight", 10))


@pytest.mark.slow
def test_a_wrong_key_ends_with_one_line_and_code_2(tmp_path):
    done = run_python(["-m", "trainer.worker", "--config", "digits", "--set", "training.r1_gama=1"])
    assert done.returncode == 2
    assert "r1_gamma" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_replaced_samples_are_counted_in_the_curve_and_named_in_a_file_that_survives_a_stop(tiny, tmp_path):
    settings = damaged_copy(tiny, tmp_path / "data", *range(0, 1797, 25))
    whole, parts = (configure(settings, tmp_path / name) for name in ("whole", "parts"))
    _, straight = train(whole)
    _, before = train(parts, Stopper(6))
    _, after = train(parts)
    counts = {step: metrics["replaced_samples"] for step, metrics in straight.metrics.items()}
    assert sum(counts.values()) > 0
    assert {step: m["replaced_samples"] for step, m in (before.metrics | after.metrics).items()} == counts
    named = [(tmp_path / name / "replaced-samples.txt").read_text().splitlines() for name in ("whole", "parts")]
    assert len(named[0]) == sum(counts.values())  # less than an epoch: each came once
    assert sorted(named[0]) == sorted(named[1])
    assert all("the image is damaged" in line and "is read in its place" in line for line in named[0])
    assert_same_state(state_of(tmp_path / "parts", 10), state_of(tmp_path / "whole", 10))


def test_run_without_bad_samples_counts_none_and_leaves_no_list(straight):
    assert all(metrics["replaced_samples"] == 0 for metrics in straight[1].metrics.values())
    assert not (straight[0] / "replaced-samples.txt").exists()


@pytest.mark.slow
def test_too_many_bad_samples_end_the_run_with_their_names(tiny, tmp_path):
    settings = damaged_copy(tiny, tmp_path / "data", *range(0, 1797, 5))
    with pytest.raises(
        DataError, match=r"unusable, more than data\.max_bad_percent of 5 allows: shard 00000\.tar, key"
    ):
        train(configure(settings, tmp_path / "run", "training.total_images=1600"))


EARLIER = (
    "data.loader_workers=0",
    "generator.base_channels=16",
    "generator.latent_dim=4",
    "generator.latent_embedding_dim=8",
    "discriminator.base_channels=8",
    "discriminator.time_embedding_dim=8",
    "training.global_batch_size=16",
    "training.total_images=160",
    "engine.backend=torch",
    "scaling.world_size=1",
    "tracking.backends=[]",
    "tracking.log_interval_steps=4",
)
"""Of gaussians25, for the run in golden/run-format-1.tar.gz."""


def test_a_run_of_an_earlier_layout_of_the_code_resumes(tmp_path):
    # Stopped at step 6 of 10 by the code that had every file of trainer/ in one folder.
    with tarfile.open(ROOT / "tests" / "golden" / "run-format-1.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    before = state_of(tmp_path / "run", 6)
    outcome, recorder = train(
        load_config("gaussians25", [*EARLIER, f"data.path={tmp_path}/points", f"run.directory={tmp_path}/run"])
    )
    assert (outcome.finished, outcome.step) == (True, 10)
    assert sorted(recorder.metrics) == [8, 10]
    after = state_of(tmp_path / "run", 10)
    kept = [name for name in before if "/parameter/" in name or "/exp_avg" in name or "/average/" in name]
    assert len(kept) > 100
    assert all(after[name].shape == before[name].shape for name in kept)
    assert not [name for name in kept if "/parameter/" in name and torch.equal(after[name], before[name])]
