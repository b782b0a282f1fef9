"""An exported model draws, with nothing but torch, what the training program draws."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.runs import configure, train
from trainer.export.command import main
from trainer.export.programs import GENERATOR, IMAGES
from trainer.sample.draw import load_run, sample_run

pytestmark = pytest.mark.slow  # exporting a graph takes half a minute

NUMS = (64, 5)
DRAWS = """
import sys
import numpy, torch
assert not any(name in sys.modules for name in ("models", "trainer", "data"))
draw = torch.export.load(sys.argv[1]).module()
for num in map(int, sys.argv[3:]):
    numpy.save(f"{sys.argv[2]}/{num}.npy", draw(torch.tensor(3), torch.arange(num), *LABEL).numpy())
"""


def trained(tiny, directory: Path, *sets: str) -> Path:
    # A rate that moves the near-zero output layer away from grey within ten steps.
    train(configure(tiny, directory, "training.learning_rate_g.peak=0.05", *sets))
    return directory


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """Of a model with classes."""
    return trained(tiny, tmp_path_factory.mktemp("run"), "data.num_classes=10", "diffusion.num_timesteps=2")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "model"
    assert main(["--run", str(run), "--out", str(out)]) == 0
    return out


def drawn_elsewhere(model: Path, folder: Path, label: str) -> dict[int, torch.Tensor]:
    """What a process that cannot import this project draws with seed 3, for each of `NUMS`."""
    code = DRAWS.replace("*LABEL", label)
    line = [sys.executable, "-P", "-c", code, str(model / IMAGES), str(folder), *map(str, NUMS)]
    subprocess.run(line, check=True, cwd=folder, env={"OMP_NUM_THREADS": "1"})
    return {num: torch.from_numpy(np.load(folder / f"{num}.npy")) for num in NUMS}


def test_a_process_without_this_project_draws_the_same_images_pixel_for_pixel(run, exported, tmp_path):
    drawn = drawn_elsewhere(exported, tmp_path, "torch.arange(num) % 10")
    expected = sample_run(run, 64, seed=3)
    assert len(expected.unique()) > 50
    assert torch.equal(drawn[64], expected)
    # Another batch size changes the order of float sums, which may turn a rounding.
    assert (drawn[5].int() - expected[:5].int()).abs().max() <= 1


def test_a_model_without_classes_is_drawn_without_labels(tiny, tmp_path):
    run, model = trained(tiny, tmp_path / "run", "diffusion.num_timesteps=1"), tmp_path / "model"
    assert main(["--run", str(run), "--out", str(model)]) == 0
    assert torch.equal(drawn_elsewhere(model, tmp_path, "")[64], sample_run(run, 64, seed=3))
    call = "images = draw(torch.tensor(seed), torch.arange(64))  # uint8 [64, 1, 8, 8]"
    assert call in (model / "README.md").read_text()


def test_the_generator_alone_is_a_program_too(run, exported):
    generator, _, config = load_run(run)
    program = torch.export.load(exported / GENERATOR).module()
    x_t, z = torch.randn(64, 1, 8, 8), torch.randn(64, config.generator.latent_dim)
    t = torch.arange(64) % config.diffusion.num_timesteps
    label = torch.arange(64) % 11  # 10 is no label
    torch.testing.assert_close(program(x_t, t, z, label), generator(x_t, t, z, label), rtol=0, atol=1e-6)


def test_the_folder_is_a_snapshot_for_the_other_commands(run, exported):
    assert torch.equal(sample_run(exported, 4, seed=1), sample_run(run, 4, seed=1))


def test_the_card_says_what_is_known_and_leaves_blanks_for_what_is_not(run, exported):
    card = (exported / "README.md").read_text()
    assert "| trained | 10 steps, 160 images seen, averaged weights |" in card
    assert "images = draw(torch.tensor(seed), torch.arange(64), label)  # uint8 [64, 1, 8, 8]" in card
    assert "`label` is int64 [64], 0 to 9." in card
    assert "source and licence not stated" in card and "| intended use | not stated" in card
    assert "- loss_g: " in card


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

    monkeypatch.setattr("trainer.export.command.write_programs", fails)
    assert main(["--run", str(run), "--out", str(tmp_path / "new")]) == 2
    assert not list(tmp_path.iterdir())
