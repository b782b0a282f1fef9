"""An exported model draws, without this project, what the training program draws."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.storage.errors import OperationError
from tests.launch import run_python
from tests.trainer.evaluate.scripted_networks import Plain, scripted
from tests.trainer.export.elsewhere import run_elsewhere
from tests.trainer.runs import configure, train
from trainer.checkpoint.storage import storage_of_run
from trainer.evaluate import command as evaluate
from trainer.export import onnx_graphs
from trainer.export.command import main
from trainer.export.programs import GENERATOR, IMAGES
from trainer.sample.draw import load_run, sample_run

pytestmark = pytest.mark.slow  # exporting a graph takes half a minute

NUMS = (64, 5)
SAVES = "checkpoint.save_interval_steps=8"
WITH_TORCH = """
import sys
import numpy, torch
assert not any(name in sys.modules for name in ("models", "trainer", "data"))
draw = torch.export.load(sys.argv[1] + "/images.pt2").module()
for num in map(int, sys.argv[3:]):
    numpy.save(f"{sys.argv[2]}/{num}.npy", draw(torch.tensor(3), torch.arange(num), *LABEL).numpy())
"""
WITH_DIFFUSERS = """
import sys
import numpy
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
for num in map(int, sys.argv[3:]):
    numpy.save(f"{sys.argv[2]}/{num}.npy", pipeline(num_images=num, seed=3, output_type="pt").images.numpy())
later = pipeline(num_images=2, seed=3, first=3, output_type="np").images
assert (later == pipeline(num_images=5, seed=3, output_type="np").images[3:]).all()
numpy.save(f"{sys.argv[2]}/7.npy", pipeline(num_images=7, seed=3, labels=7, output_type="pt").images.numpy())
(image,) = pipeline(seed=3).images
assert (image.size, image.mode) == ((8, 8), "L")
for wrong in ({"labels": [10]}, {"guidance_scale": 2.0}, {"output_type": "latent"}):
    try:
        pipeline(**wrong)
    except ValueError as error:
        print(error)
assert not any(name in sys.modules for name in ("models", "trainer", "data"))
"""


def trained(tiny, directory: Path, *sets: str) -> Path:
    # A rate that moves the near-zero output layer away from grey within ten steps.
    # One block a level: a smaller graph is exported faster.
    smaller = ("training.learning_rate_g.peak=0.05", "generator.num_res_blocks=1")
    train(configure(tiny, directory, *smaller, *sets))
    return directory


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """Of a model with classes."""
    return trained(tiny, tmp_path_factory.mktemp("run"), "data.num_classes=10", "diffusion.num_timesteps=2", SAVES)


def measured(run: Path, reference: Path, folder: Path, *more: str) -> Path:
    """A card of trainer.evaluate."""
    network = scripted(Plain(), folder / "network.pt")
    line = ["--run", str(run), "--reference", str(reference), "--network", str(network), "--num", "64"]
    assert evaluate.main([*line, "--card", str(folder / "card.json"), *more]) == 0
    return folder / "card.json"


@pytest.fixture(scope="module")
def figures(run, tiny_digits, tmp_path_factory) -> Path:
    """The figures of both checkpoints of the run."""
    return measured(run, tiny_digits, tmp_path_factory.mktemp("figures"), "--checkpoints", "all")


@pytest.fixture(scope="module")
def exported(run, figures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    words = ["--run", str(run), "--out", str(out), "--to", "torch,onnx,diffusers", "--figures", str(figures)]
    done = run_python(["-m", "trainer.export", *words])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}: see README.md in it\n", "")
    assert {file.stat().st_mode & 0o077 for file in out.rglob("*") if file.is_file()} == {0o044}
    return out


def drawn_elsewhere(code: str, model: Path, folder: Path) -> tuple[dict[int, torch.Tensor], str]:
    """What a process that cannot import this project draws with seed 3, for each of `NUMS`; and what it prints."""
    said = run_elsewhere(code, str(model), str(folder), *map(str, NUMS), folder=folder)
    return {int(file.stem): torch.from_numpy(np.load(file)) for file in folder.glob("*.npy")}, said


def test_a_process_with_nothing_but_torch_draws_the_same_images_pixel_for_pixel(run, exported, tmp_path):
    drawn, _ = drawn_elsewhere(WITH_TORCH.replace("*LABEL", "torch.arange(num) % 10"), exported, tmp_path)
    expected = sample_run(run, 64, seed=3)
    assert len(expected.unique()) > 50
    assert torch.equal(drawn[64], expected)
    # Another batch size changes the order of float sums, which may turn a rounding.
    assert (drawn[5].int() - expected[:5].int()).abs().max() <= 1


def test_a_process_with_diffusers_draws_the_same_images_pixel_for_pixel(run, exported, tmp_path):
    drawn, said = drawn_elsewhere(WITH_DIFFUSERS, exported, tmp_path)
    for num in NUMS:
        assert torch.equal(drawn[num], sample_run(run, num, seed=3))
    assert torch.equal(drawn[7], sample_run(run, 7, seed=3, classes=[7]))
    assert said.splitlines() == [
        "labels are [10]; allowed: 0 to 9",
        "guidance_scale is given, but this model never saw an image without its label or condition",
        "output_type is latent; allowed: pil, np, pt",
    ]


def test_a_model_without_classes_is_drawn_without_labels(tiny, tmp_path):
    sets = ("diffusion.num_timesteps=1", "generator.channel_multipliers=[1]", "generator.attention_resolutions=[]")
    run, model = trained(tiny, tmp_path / "run", *sets), tmp_path / "model"
    assert main(["--run", str(run), "--out", str(model)]) == 0
    (tmp_path / "drawn").mkdir()
    drawn, _ = drawn_elsewhere(WITH_TORCH.replace("*LABEL", ""), model, tmp_path / "drawn")
    assert torch.equal(drawn[64], sample_run(run, 64, seed=3))
    call = "images = draw(torch.tensor(seed), torch.arange(64))  # uint8 [64, 1, 8, 8]"
    assert call in (model / "README.md").read_text()
    assert {file.name for file in model.iterdir()} == {
        *("README.md", "config.yaml", "generator.safetensors"),
        *(IMAGES, GENERATOR),
    }


def test_the_generator_alone_is_a_program_too(run, exported):
    generator, _, config = load_run(run)
    program = torch.export.load(exported / GENERATOR).module()
    x_t, z = torch.randn(64, 1, 8, 8), torch.randn(64, config.generator.latent_dim)
    t = torch.arange(64) % config.diffusion.num_timesteps
    label = torch.arange(64) % 11  # 10 is no label
    torch.testing.assert_close(program(x_t, t, z, label), generator(x_t, t, z, label), rtol=0, atol=1e-6)


def test_onnx_graphs_compute_what_torch_computes_for_any_number_of_images(run, exported):
    import onnx
    import onnxruntime

    generator, diffusion, config = load_run(run)
    for num in (16, 3):
        x_t, z = torch.randn(num, 1, 8, 8), torch.randn(num, 2, config.generator.latent_dim)
        noise, label = torch.randn(num, 2, 1, 8, 8), torch.arange(num) % 10
        graphs = {
            onnx_graphs.GENERATOR: ({"x_t": x_t, "t": label % 2, "z": z[:, 0], "label": label}, generator),
            onnx_graphs.LOOP: (
                {"noise_T": x_t, "z": z, "noise": noise, "label": label},
                onnx_graphs.DenoisingLoop(generator, diffusion, config),
            ),
        }
        for name, (inputs, expected) in graphs.items():
            file = str(exported / name)
            onnx.checker.check_model(file)
            assert onnx.load(file).opset_import[0].version >= 18
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            output = np.asarray(session.run(None, {key: value.numpy() for key, value in inputs.items()})[0])
            assert len(np.unique(output)) > 100
            wanted = expected(*inputs.values()).numpy()
            np.testing.assert_allclose(output, wanted, rtol=0, atol=onnx_graphs.MAX_DIFFERENCE)


def test_a_graph_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    layer, x = torch.nn.Linear(4, 4), torch.randn(16, 4)
    onnx_graphs.write_graph(tmp_path / "same.onnx", layer, {"x": x}, "y")
    monkeypatch.setattr(onnx_graphs, "_run", lambda _: lambda inputs: inputs["x"])
    with pytest.raises(OperationError, match=r"other\.onnx is not kept: onnxruntime's output differs from torch's by"):
        onnx_graphs.write_graph(tmp_path / "other.onnx", layer, {"x": x}, "y")


def test_without_its_libraries_onnx_is_refused_before_any_work(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_graphs, "LIBRARIES", ("onnx", "no_such_library"))
    assert main(["--run", str(run), "--out", str(tmp_path / "new"), "--to", "onnx"]) == 2
    assert "--to onnx needs no_such_library, which this Python does not have" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_folder_is_a_snapshot_for_the_other_commands(run, exported, tmp_path, capsys):
    assert torch.equal(sample_run(exported, 4, seed=1), sample_run(run, 4, seed=1))
    assert main(["--run", str(exported), "--to", "diffusers", "--out", str(tmp_path / "again")]) == 0
    assert "| trained | 10 steps, averaged weights |" in (tmp_path / "again" / "README.md").read_text()
    assert main(["--run", str(exported), "--checkpoint", "10", "--out", str(tmp_path / "more")]) == 2
    assert "is one snapshot and has no checkpoints: leave --checkpoint out" in capsys.readouterr().err
    weights = Path("generator", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / "again" / weights).read_bytes() == (exported / weights).read_bytes()


def test_weights_alone_are_a_model_for_the_training_program(run, tmp_path):
    assert main(["--run", str(run), "--to", "safetensors", "--out", str(tmp_path / "model")]) == 0
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        "README.md",
        "config.yaml",
        "generator.safetensors",
    }
    assert "takes this folder as `--run`" in (tmp_path / "model" / "README.md").read_text()
    assert torch.equal(sample_run(tmp_path / "model", 4, seed=1), sample_run(run, 4, seed=1))


def test_the_card_says_what_is_known_and_leaves_blanks_for_what_is_not(run, exported, figures):
    card = (exported / "README.md").read_text()
    *_, checkpoint = storage_of_run(run).list()
    assert "| trained | 10 steps, 160 images seen, averaged weights |" in card
    assert f"shards with the digest {checkpoint.manifest['data']}; prepared from digits" in card
    assert "images = draw(torch.tensor(seed), torch.arange(64), label)  # uint8 [64, 1, 8, 8]" in card
    assert "`label` is int64 [64], 0 to 9." in card
    assert "pipeline(num_images=16, seed=0, labels=[0, 1])" in card
    assert '"noise": standard_normal([B, 2, 1, 8, 8]),' in card
    assert "its licence: not stated" in card and "| intended use | not stated" in card
    assert "- loss_g: " in card
    earlier, last = json.loads(figures.read_text())["results"]
    assert (earlier["step"], last["step"]) == (8, 10)
    assert f"- kid (step 10): {last['figures']['kid']:.4g}\n" in card
    assert "inception_score" not in card  # which this network cannot measure
    assert "(step 8)" not in card
    assert json.loads(figures.read_text())["command"] in card


def test_a_wrong_form_and_a_card_of_something_else_are_refused(run, figures, tiny_digits, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--run", str(run), "--out", str(tmp_path / "new"), "--to", "torch,keras"])
    assert "'keras' is no form; allowed: safetensors, torch, diffusers, onnx" in capsys.readouterr().err
    # Figures of the same step, but of the live weights.
    live = measured(run, tiny_digits, tmp_path, "--weights", "live")
    capsys.readouterr()
    words = ["--figures", str(figures), "--figures", str(live)]
    assert main(["--run", str(run), "--out", str(tmp_path / "new"), *words]) == 2
    told = "--figures: card 2 has no figures of the weights that are exported, but of step 10: measure these weights"
    assert told in capsys.readouterr().err
    (tmp_path / "card.json").write_text("{}")
    words = ["--figures", str(tmp_path / "card.json")]
    assert main(["--run", str(run), "--out", str(tmp_path / "new"), *words]) == 2
    assert "is no card of format 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_with_something_in_it_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert main(["--run", str(run), "--out", str(tmp_path)]) == 2
    assert "exists and is not an empty folder: give a new one, or empty it" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_run_without_a_checkpoint_and_a_step_that_is_not_there_are_refused(run, tmp_path, capsys):
    assert main(["--run", str(run), "--checkpoint", "7", "--out", str(tmp_path / "new")]) == 2
    assert "has no checkpoint of step 7; it has [" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["--run", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_when_it_fails_half_way(run, tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.export.command.model_card", fails)
    assert main(["--run", str(run), "--to", "diffusers", "--out", str(tmp_path / "new")]) == 2
    assert not list(tmp_path.iterdir())
