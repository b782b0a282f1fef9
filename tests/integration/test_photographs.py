"""From a folder of photographs to a trained network, stopped and resumed, on two Ray workers; at 64 and 256 px."""

import os
import signal
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

NARROW = (
    "scaling.world_size=2",
    "scaling.device=cpu",
    "data.loader_workers=1",
    "generator.base_channels=4",
    "generator.num_res_blocks=1",
    "generator.latent_embedding_dim=32",
    "discriminator.base_channels=2",
    "training.global_batch_size=8",
    "training.micro_batch_size=4",
    "training.total_images=160",
    "tracking.log_interval_steps=5",
    "grids.interval_steps=null",
    "grids.num_images=4",
    "checkpoint.save_interval_steps=5",
)
AT_SIZE = {
    64: ("data.image_size=64", "generator.channel_multipliers=[1, 1, 2]", "generator.attention_resolutions=[16]"),
    256: (),
}

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def made_photographs(tmp_path_factory) -> Path:
    """JPEGs of several sizes and shapes, one grey and one with an alpha channel among them."""
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    for i in range(40):
        coarse = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(rng.integers(260, 400)), int(rng.integers(260, 400))))
        image.convert("L" if i == 3 else "RGB").save(folder / f"{i:03d}.jpg", quality=90)
    Image.new("RGBA", (300, 300), (200, 30, 30, 128)).save(folder / "alpha.png")
    return folder


@pytest.mark.parametrize(("source", "size"), [("made", 64), ("made", 256), ("real", 256)])
def test_photographs_train_stop_and_resume_as_one_run(source, size, made_photographs, tmp_path):
    if source == "real" and not PHOTOGRAPHS.is_dir():
        pytest.skip("the folder of real photographs, shared/data/photos beside the checkout, is absent")
    if (source, size) == ("made", 256) and PHOTOGRAPHS.is_dir():
        pytest.skip("the real photographs are there and are taken at this size")
    photographs = PHOTOGRAPHS if source == "real" else made_photographs
    data, directory, log = tmp_path / "data", tmp_path / "run", tmp_path / "log.txt"
    assert prepare.main([str(photographs), "--out", str(data), "--size", str(size), "--workers", "2"]) == 0

    overrides = (*NARROW, *AT_SIZE[size], f"data.path={data}")
    arguments = train_command("celebahq256", overrides, directory)
    with running(arguments, log) as process:
        wait_for_checkpoint(directory, process, log)
        if size == 256:
            process.send_signal(signal.SIGTERM)  # to the driver alone, as a scheduler may send it
        else:
            os.killpg(process.pid, signal.SIGINT)  # to all, as a terminal does
        assert process.wait(timeout=180) == STOPPED, log.read_text()[-3000:]
    text = log.read_text()
    assert f"{'SIGTERM' if size == 256 else 'SIGINT'}: finishing the step and writing a checkpoint" in text
    assert "stopped; the same command resumes" in text
    assert "Traceback" not in text
    stopped_at = list_checkpoints(directory / "checkpoints")[-1].step
    assert 5 <= stopped_at < 20

    done = run_python(arguments, timeout_s=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {directory}/checkpoints/step-{stopped_at:08d}" in done.stderr
    assert "finished: step 20, 160 images" in done.stdout
    assert Image.open(directory / "samples" / "step-00000020.png").mode == "RGB"

    # On a busy machine the uploader may still be at work: this waits for it.
    delivered = run_python(["-m", "trainer.tracking", "deliver", "--run", str(directory)])
    assert delivered.returncode == 0, delivered.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.data.params["training.total_images"] == "160"
    points = [point.step for point in client.get_metric_history(run.info.run_id, "loss_g")]
    assert sorted(points) == [5, 10, 15, 20]  # no gap and no doubled point
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id, "snapshot")}
    assert artifacts == {"snapshot/config.yaml", "snapshot/generator.safetensors"}
    memory = {p.step: p.value for p in client.get_metric_history(run.info.run_id, "peak_memory_gib")}
    assert sorted(memory) == [5, 10, 15, 20]
    assert memory[20] - memory[15] < 0.1  # GiB; all is allocated by then, what still grows would be a leak
