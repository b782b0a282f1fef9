"""Samples are a function of weights, seed and number; the command refuses what it cannot do."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.storage.errors import UserError
from models.diffusion import Diffusion, DiffusionConfig
from tests.trainer.runs import configure, train
from trainer.checkpoint.format import CheckpointError
from trainer.checkpoint.storage import storage_of_run
from trainer.config.train_config import TrainConfig
from trainer.sample.command import main
from trainer.sample.draw import images_at_once, load_run, sample_batches, sample_run
from trainer.sample.images import to_uint8


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    # A rate that moves the near-zero output layer away from grey within ten steps.
    train(configure(tiny, directory, "checkpoint.save_interval_steps=4", "training.learning_rate_g.peak=0.05"))
    return directory


@pytest.mark.slow
def test_an_image_does_not_depend_on_how_many_are_drawn(run):
    many = sample_run(run, 70, seed=3)
    assert many.shape == (70, 1, 8, 8)
    assert many.dtype == torch.uint8
    for num in (1, 5, 64, 65):
        assert torch.equal(sample_run(run, num, seed=3), many[:num])
    assert not torch.equal(sample_run(run, 5, seed=4), many[:5])


def test_images_of_one_seed_differ(run):
    images = sample_run(run, 20, seed=0).flatten(1)
    assert len({tuple(image.tolist()) for image in images}) == 20


def test_another_checkpoint_gives_other_images(run):
    assert not torch.equal(sample_run(run, 4, seed=0, choice=8), sample_run(run, 4, seed=0))


def test_the_best_checkpoint_is_that_with_the_best_value_of_its_curve(tiny, run, tmp_path):
    with pytest.raises(CheckpointError, match="keep_best names no curve"):
        sample_run(run, 1, seed=0, choice="best")
    steps = ("checkpoint.save_interval_steps=2", "tracking.log_interval_steps=2", "checkpoint.keep_last=10")
    best = ("checkpoint.keep_best=loss_g", "checkpoint.keep_best_mode=max")
    train(configure(tiny, tmp_path, *steps, *best, "training.learning_rate_g.peak=0.05"))
    saved = storage_of_run(tmp_path).list()
    assert [checkpoint.step for checkpoint in saved] == [2, 4, 6, 8, 10]
    values = {checkpoint.step: checkpoint.manifest["metrics"]["loss_g"] for checkpoint in saved}
    step = max(values, key=lambda step: values[step])
    assert torch.equal(sample_run(tmp_path, 4, seed=0, choice="best"), sample_run(tmp_path, 4, seed=0, choice=step))
    assert torch.equal(sample_run(tmp_path, 4, seed=0, choice="latest"), sample_run(tmp_path, 4, seed=0, choice=10))
    assert not torch.equal(sample_run(tmp_path, 4, seed=0, choice=2), sample_run(tmp_path, 4, seed=0, choice=10))


def test_live_weights_are_those_that_the_optimizer_changed_last(tiny, tmp_path):
    config = configure(tiny, tmp_path, "training.learning_rate_g.peak=0.05", "training.ema_half_life_images=1.0e-9")
    train(config)  # an average that forgets at once equals the live weights
    assert torch.equal(sample_run(tmp_path, 4, seed=0, weights="live"), sample_run(tmp_path, 4, seed=0))


def test_live_weights_differ_from_their_average_and_a_snapshot_has_none(run):
    assert not torch.equal(sample_run(run, 4, seed=0, weights="live"), sample_run(run, 4, seed=0))
    (snapshot,) = (run / "snapshots").iterdir()
    assert torch.equal(sample_run(snapshot, 4, seed=0), sample_run(run, 4, seed=0))
    with pytest.raises(UserError, match="is a snapshot, which has only averaged weights"):
        sample_run(snapshot, 4, seed=0, weights="live")


def test_seeds_draw_the_first_image_of_each(run, tmp_path):
    assert main(["--run", str(run), "--seeds", "5,0-2", "--out", str(tmp_path / "a.npz")]) == 0
    images = torch.from_numpy(np.load(tmp_path / "a.npz")["images"]).permute(0, 3, 1, 2)
    assert len(images) == 4
    for image, seed in zip(images, (5, 0, 1, 2), strict=True):
        # The place in a batch may change the order of float sums, which may turn a rounding.
        assert (image.int() - sample_run(run, 1, seed=seed)[0].int()).abs().max() <= 1
    with pytest.raises(SystemExit, match="2"):
        main(["--run", str(run), "--seeds", "5", "--num", "3", "--out", str(tmp_path / "b.npz")])


def test_missing_checkpoint_is_named_with_those_that_exist(run):
    for step in (0, 5):
        with pytest.raises(CheckpointError, match=rf"has no checkpoint of step {step}; it has \[8, 10\]"):
            sample_run(run, 4, seed=0, choice=step)


def test_the_network_always_sees_the_same_number_of_images(run, monkeypatch):
    generator, diffusion, config = load_run(run)
    seen: list[int] = []

    def counting(x_t: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        seen.append(len(x_t))
        return torch.zeros_like(x_t)

    monkeypatch.setattr(generator, "forward", counting)
    list(sample_batches(generator, diffusion, config, num=70, seed=0))
    assert seen == [64] * 2 * 4  # two passes of four steps


def test_images_at_once_shrink_with_their_size():
    assert [images_at_once(size) for size in (8, 32, 64, 128, 256, 1024)] == [64, 64, 64, 16, 4, 1]


def test_an_oracle_generator_is_sampled_exactly(run):
    _, _, config = load_run(run)
    target = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)

    class Oracle(torch.nn.Linear):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:  # pyright: ignore
            return target.expand_as(x_t)

    diffusion = Diffusion.from_config(DiffusionConfig(), torch.device("cpu"))
    (images,) = sample_batches(Oracle(1, 1), diffusion, config, num=2, seed=0)
    assert torch.equal(images[1], to_uint8(target)[0])


class OfLabel(torch.nn.Linear):
    """A generator that paints 0.1 for class 1, 0.3 for class 2, and 0.0 without a class."""

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, z: torch.Tensor, label: torch.Tensor) -> torch.Tensor:  # pyright: ignore
        values = torch.tensor([-0.1, 0.1, 0.3, 0.0])[label]
        return values.view(-1, 1, 1, 1).expand_as(x_t)


def with_labels(config: TrainConfig, label_dropout: float = 0.1) -> TrainConfig:
    training = dataclasses.replace(config.training, label_dropout=label_dropout)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, num_classes=3), training=training)


@pytest.mark.parametrize(
    ("guidance", "values"), [(1.0, [0.1, 0.3]), (0.0, [0.0, 0.0]), (3.0, [0.3, 0.9]), (5.0, [0.5, 1.0])]
)
def test_guidance_moves_from_no_class_through_the_class_and_is_clipped(run, guidance, values):
    diffusion = Diffusion.from_config(DiffusionConfig(), torch.device("cpu"))
    config = with_labels(load_run(run)[2])
    (images,) = sample_batches(OfLabel(1, 1), diffusion, config, num=2, seed=0, classes=[1, 2], guidance=guidance)
    assert torch.equal(images, to_uint8(torch.tensor(values).view(2, 1, 1, 1).expand(2, 1, 8, 8)))


def test_guidance_that_the_model_cannot_give_is_refused(run):
    generator, diffusion, plain = load_run(run)

    def refusal(config: TrainConfig, guidance: float) -> str:
        with pytest.raises(UserError) as caught:
            next(sample_batches(generator, diffusion, config, num=2, seed=0, guidance=guidance))
        return str(caught.value)

    assert "trained without classes: data.num_classes is 0" in refusal(plain, 2.0)
    assert "Train with training.label_dropout, such as 0.1" in refusal(with_labels(plain, 0.0), 2.0)
    for wrong in (-1.0, 101.0, float("nan")):
        assert "allowed: 0 to 100, where 1 is none" in refusal(with_labels(plain), wrong)


@pytest.mark.parametrize("name", ["grid.png", "images.npz", "folder"])
def test_command_writes_the_form_that_the_name_asks_for(run, tmp_path, name, capsys):
    assert main(["--run", str(run), "--num", "4", "--out", str(tmp_path / name)]) == 0
    expected = sample_run(run, 4, seed=0)
    if name == "images.npz":
        assert np.array_equal(np.load(tmp_path / name)["images"], expected.permute(0, 2, 3, 1).numpy())
    elif name == "folder":
        pictures = [np.asarray(Image.open(file)) for file in sorted((tmp_path / name).iterdir())]
        assert np.array_equal(np.stack(pictures), expected[:, 0].numpy())
    else:
        assert Image.open(tmp_path / name).width >= 512
    assert str(tmp_path / name) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "/nowhere", "--out", "x.png"], "/nowhere is not the directory of a run"),
        (["--run", "{run}", "--out", "x.bmp"], "unknown extension .bmp"),
        (
            ["--run", "{run}", "--out", "x.png", "--num", "0"],
            "'0' is given, allowed is a whole number of 1 or more",
        ),
        (["--run", "{run}", "--out", "x.png", "--seed", "-1"], "'-1' is given, allowed is a whole number of 0 to"),
        (["--run", "{run}", "--out", "x.png", "--checkpoint", "7"], "has no checkpoint of step 7; it has [8, 10]"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main([a.format(run=run) for a in arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
