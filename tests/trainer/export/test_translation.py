"""An exported model of pairs draws, without this project, what `trainer.translate` draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.prepare import command as prepare
from tests.trainer.export.elsewhere import run_elsewhere
from tests.trainer.runs import configure, train
from trainer import translate
from trainer.export import onnx_graphs
from trainer.export.command import main
from trainer.sample.conditions import PreparedPairs
from trainer.sample.draw import load_run, to_condition

pytestmark = pytest.mark.slow  # exporting a graph takes half a minute

INPUTS, NUM = 23, 3
"""Two batches of 64."""
DRAWS = """
import sys
import numpy, torch
from diffusers import DiffusionPipeline
model, given = sys.argv[1], numpy.load(sys.argv[2])
with_diffusers = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
with_diffusers.set_progress_bar_config(disable=True)
images = with_diffusers(conditions=list(given), num_images=NUM, seed=3, output_type="np").images
numpy.save("diffusers.npy", images.transpose(0, 3, 1, 2))
draw = torch.export.load(f"{model}/images.pt2").module()
condition = torch.from_numpy(given).permute(0, 3, 1, 2).repeat_interleave(NUM, 0)[:64]
numpy.save("torch.npy", draw(torch.tensor(3), torch.arange(64) % NUM, condition=condition).numpy())
assert not any(name in sys.modules for name in ("models", "trainer", "data"))
"""


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """Of the digits at 8 px, each with itself at 4."""
    pairs, directory = (tmp_path_factory.mktemp("made") / name for name in ("pairs", "run"))
    line = ["digits4x", "--out", str(pairs), "--size", "8", "--max-images", "50", "--workers", "0"]
    assert prepare.main(line) == 0
    smaller = ("generator.num_res_blocks=1", "diffusion.num_timesteps=2", f"data.path={pairs}")
    smaller += ("generator.channel_multipliers=[1]", "generator.attention_resolutions=[]")
    train(configure(tiny, directory, *smaller, "data.condition_channels=1", "training.learning_rate_g.peak=0.05"))
    return directory


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    assert main(["--run", str(run), "--to", "torch,onnx,diffusers", "--out", str(out)]) == 0
    return out


def test_other_processes_translate_the_same_pixels(run, exported, tmp_path):
    config = load_run(run)[2]
    line = ["--input", config.data.path, "--max-inputs", str(INPUTS), "--num", str(NUM), "--seed", "3"]
    # The exported folder is a run for this command, too.
    assert translate.main(["--run", str(exported), *line, "--out", str(tmp_path / "out")]) == 0
    names = [f"{i:06d}-{k}.png" for i in range(INPUTS) for k in range(NUM)]
    expected = np.stack([np.asarray(Image.open(tmp_path / "out" / name)) for name in names])[:, None]
    with PreparedPairs(config.data.path, config) as pairs:
        np.save(tmp_path / "given.npy", pairs(range(INPUTS)).permute(0, 2, 3, 1).numpy())
    run_elsewhere(DRAWS.replace("NUM", str(NUM)), str(exported), "given.npy", folder=tmp_path)
    assert len(np.unique(expected)) > 50
    assert np.array_equal(np.load(tmp_path / "diffusers.npy"), expected)
    assert np.array_equal(np.load(tmp_path / "torch.npy"), expected[:64])


def test_onnx_graphs_of_pairs_compute_what_torch_computes(run, exported):
    import onnxruntime

    loaded = load_run(run)
    config = loaded[2]
    with PreparedPairs(config.data.path, config) as pairs:
        condition = to_condition(pairs(range(5)), config, "cpu")
    noise_T, z, noise = (
        torch.randn(5, 1, 8, 8),
        torch.randn(5, 2, config.generator.latent_dim),
        torch.randn(5, 2, 1, 8, 8),
    )
    inputs = {"noise_T": noise_T, "z": z, "noise": noise, "condition": condition}
    session = onnxruntime.InferenceSession(str(exported / onnx_graphs.LOOP), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    wanted = onnx_graphs.DenoisingLoop(*loaded)(**inputs).numpy()
    np.testing.assert_allclose(np.asarray(output), wanted, rtol=0, atol=onnx_graphs.MAX_DIFFERENCE)
    other = onnx_graphs.DenoisingLoop(*loaded)(**{**inputs, "condition": -condition}).numpy()
    assert abs(wanted - other).max() > 0.01


def test_the_card_says_what_the_condition_is(exported):
    card = (exported / "README.md").read_text()
    assert "pipeline_tag: image-to-image\n" in card
    condition = "grey of 8 bits, the square centre of the given image at 8 x 8 px"
    assert f"It translates: each image is drawn for a given one, its condition, {condition}." in card
    assert f"| condition | {condition} |" in card
    assert "pipeline(conditions=conditions, num_images=4, seed=0).images" in card
    assert "PIL images, which are cropped and resized as in training, or numpy arrays of uint8 [8, 8, 1]." in card
    assert "draw(torch.tensor(seed), torch.arange(64), condition=condition)  # uint8 [64, 1, 8, 8]" in card
    assert "`condition` is uint8 [64, 1, 8, 8]." in card
    assert '"condition": float32 [B, 1, 8, 8] in [-1, 1],' in card
    assert "| images.onnx | maps noise, condition to images: all steps |" in card
