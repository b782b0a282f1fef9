"""From a folder of photographs to a trained network, stopped in two ways and resumed, on two Ray workers."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from data.prepare import command as prepare
from tests.launch import ROOT, run_python, running, train_command, wait_for_checkpoint
from trainer.checkpoint.format import list_checkpoints
from trainer.run import STOPPED

PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "photos"
"""Real ones, where they are."""

SIZE = 64
"""A quarter of the config's: what matters here is not in the pixels."""

NARROW = (
    f"data.image_size={SIZE}",
    "scaling.world_size=2",
    "scaling.device=cpu",
    "data.loader_workers=1",
    "generator.base_channels=4",
    "generator.num_res_blocks=1",
    "generator.latent_embedding_dim=32",
    "discriminator.base_channels=2",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "training.total_images=120",
    "tracking.backends=[mlflow]",
    "tracking.log_interval_steps=3",
    "grids.interval_steps=null",
    "grids.num_images=4",
    "checkpoint.save_interval_steps=1",
)
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def make_photographs(folder: Path) -> None:
    """JPEGs of several sizes and shapes, one grey and one with an alpha channel among them, and real ones if any."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(rng.integers(260, 400)), int(rng.integers(260, 400))))
        image.convert("L" if i == 3 else "RGB").save(folder / f"made-{i:03d}.jpg", quality=90)
    Image.new("RGBA", (300, 300), (200, 30, 30, 128)).save(folder / "alpha.png")
    for file in sorted(PHOTOGRAPHS.glob("*.jpg"))[:40]:
        shutil.copy(file, folder)


def stop_with(number: signal.Signals, send: Callable[[int, int], None], arguments: list[str], run: Path) -> int:
    """Start the command or resume it, and stop it after its next checkpoint; the step at which it stopped.

    Args:
        number: the signal.
        send: os.kill for the process alone, os.killpg for its group.
        arguments: of Python.
        run: the directory of the run; its log is written next to it.
    """
    log, saved = run.parent / "log.txt", list_checkpoints(run / "checkpoints")
    before = saved[-1].step if saved else 0
    with running(arguments, log) as process:
        saved_at = wait_for_checkpoint(run, process, log, after=before)
        send(process.pid, number)
        assert process.wait(timeout=180) == STOPPED, log.read_text()[-3000:]
    text = log.read_text()
    assert f"{number.name}: finishing the step and writing a checkpoint" in text
    assert "stopped; the same command resumes" in text
    assert "Traceback" not in text
    assert not before or f"resuming from {run}/checkpoints/step-{before:08d}" in text
    stopped_at = list_checkpoints(run / "checkpoints")[-1].step
    assert before < saved_at <= stopped_at < 15
    return stopped_at


@pytest.mark.timeout(1200)
def test_photographs_train_stop_and_resume_as_one_run(tmp_path):
    photographs, data, directory = (tmp_path / name for name in ("photographs", "data", "run"))
    make_photographs(photographs)
    assert prepare.main([str(photographs), "--out", str(data), "--size", str(SIZE), "--workers", "2"]) == 0

    arguments = train_command("celebahq256", NARROW, directory, f"data.path={data}")
    stop_with(signal.SIGINT, os.killpg, arguments, directory)  # to all, as a terminal does
    # To the driver alone, as a scheduler may send it. To a shell and all in its group: test_rayjob.
    stopped_at = stop_with(signal.SIGTERM, os.kill, arguments, directory)

    done = run_python(arguments, timeout_s=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {directory}/checkpoints/step-{stopped_at:08d}" in done.stderr
    assert "finished: step 15, 120 images" in done.stdout
    assert Image.open(directory / "samples" / "step-00000015.png").mode == "RGB"

    # On a busy machine the uploader may still be at work: this waits for it.
    delivered = run_python(["-m", "trainer.tracking", "deliver", "--run", str(directory)])
    assert delivered.returncode == 0, delivered.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.data.params["training.total_images"] == "120"
    points = [point.step for point in client.get_metric_history(run.info.run_id, "loss_g")]
    assert sorted(points) == [3, 6, 9, 12, 15]  # no gap and no doubled point
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id, "snapshot")}
    assert artifacts == {"snapshot/config.yaml", "snapshot/generator.safetensors"}
    memory = {p.step: p.value for p in client.get_metric_history(run.info.run_id, "peak_memory_gib")}
    assert sorted(memory) == [3, 6, 9, 12, 15]
    assert memory[15] - memory[12] < 0.1  # GiB; all is allocated by then, what still grows would be a leak
