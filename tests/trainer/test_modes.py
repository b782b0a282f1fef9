"""Modes of StackedMNIST: what is counted, and with which classifier."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from data.prepare import command as prepare
from trainer import modes
from trainer.evaluate.classifier import TrainedClassifier
from trainer.modes import ModesError, count_modes, digit_classifier, single_digits

SIZE = 8


class Brightness(torch.nn.Module):
    """Classifies by the image's grey value, 20 times the digit."""

    image_size = SIZE

    def forward(self, images: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(images[:, 0, 0, 0].long() // 20, 10).float()


BY_BRIGHTNESS = TrainedClassifier(model=Brightness(), accuracy=1.0, num_held_out=1)  # pyright: ignore[reportArgumentType]


def stacks(numbers: list[int]) -> Tensor:
    """Stacks of grey squares that represent the digits of each number."""
    digits = torch.tensor([[n // 100, n // 10 % 10, n % 10] for n in numbers])
    return (20 * digits).to(torch.uint8)[:, :, None, None].expand(-1, -1, SIZE, SIZE).contiguous()


def test_modes_are_named_by_the_digits_of_the_channels():
    found = count_modes(stacks([123, 123, 321, 7, 999]), BY_BRIGHTNESS)
    assert (found.num_modes, found.num_samples) == (4, 5)


def test_divergence_is_that_of_the_frequencies_from_equal_ones():
    every = list(range(1000))
    assert count_modes(stacks(every), BY_BRIGHTNESS).kl == pytest.approx(0.0, abs=1e-9)
    assert count_modes(stacks([5] * 40), BY_BRIGHTNESS).kl == pytest.approx(math.log(1000))
    uneven = count_modes(stacks([0] * 3 + [1]), BY_BRIGHTNESS)
    assert uneven.kl == pytest.approx(0.75 * math.log(0.75 * 1000) + 0.25 * math.log(0.25 * 1000))


def test_channels_of_a_stack_are_its_digits_in_order():
    images, digits = single_digits(stacks([407, 15]), torch.tensor([407, 15]))
    assert digits.tolist() == [4, 0, 7, 0, 1, 5]
    assert images.shape == (6, 1, SIZE, SIZE)
    assert (images[:, 0, 0, 0] // 20).tolist() == digits.tolist()


def test_samples_of_another_size_are_refused():
    with pytest.raises(ModesError, match=r"\[2, 3, 16, 16\].*reference that the run was trained on"):
        count_modes(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), BY_BRIGHTNESS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Prepared stacks of synthetic digits: each digit is a bar at its own height, with some noise."""
    folder = tmp_path_factory.mktemp("stacks")
    for split, count, seed in (("train", 3000, 0), ("test", 400, 1)):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 10, count).astype(np.uint8)
        images = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 + 2 * label : 6 + 2 * label, 6:22] = 255
        np.savez(folder / f"{split}.npz", images=images, labels=labels)
        source = ["stackedmnist:" + str(folder), "--split", split, "--max-images", str(count), "--workers", "1"]
        assert prepare.main([*source, "--out", str(folder / split), "--size", "16"]) == 0
    return folder


@pytest.mark.slow
def test_command_counts_samples_with_a_classifier_that_it_has_tested(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(modes, "TRAINING_STEPS", 300)
    rng = np.random.default_rng(2)
    images = np.zeros((50, 3, 28, 28), dtype=np.uint8)
    digits = rng.integers(0, 10, (50, 3))
    for stack, triple in zip(images, digits, strict=True):
        for channel, digit in zip(stack, triple, strict=True):
            channel[4 + 2 * digit : 6 + 2 * digit, 6:22] = 255
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    halved = padded.reshape(50, 3, 16, 2, 16, 2).mean(axis=(3, 5)).round().astype(np.uint8)
    np.savez(tmp_path / "samples.npz", images=halved.transpose(0, 2, 3, 1))
    given = [
        "--samples",
        str(tmp_path / "samples.npz"),
        "--reference",
        str(made / "train"),
        "--test",
        str(made / "test"),
    ]
    assert modes.main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_modes"] == len({tuple(triple) for triple in digits.tolist()})
    assert found["classifier_accuracy"] >= 0.99
    assert modes.main(given) == 0
    assert f"{found['num_modes']} of 1000 modes" in capsys.readouterr().out


def test_classifier_that_is_not_good_enough_counts_nothing(made, monkeypatch):
    monkeypatch.setattr(modes, "TRAINING_STEPS", 1)
    with pytest.raises(ModesError, match="needs 99%"):
        digit_classifier(made / "train", made / "test", seed=0)


@pytest.fixture
def untrained(monkeypatch):
    """Fail if a classifier is trained: that takes minutes, and errors must be reported before it."""

    def train(*_, **__):
        raise AssertionError("trained")

    monkeypatch.setattr(modes, "train_classifier", train)


def refusal(capsys, *arguments) -> str:
    assert modes.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_other_data_is_refused_in_one_line(made, tiny_digits, tmp_path, capsys, untrained):
    said = refusal(capsys, "--run", tmp_path, "--reference", tiny_digits, "--test", made / "test")
    assert f"{tiny_digits} was prepared from digits" in said


def test_a_test_set_of_the_digits_that_were_learnt_is_refused(made, tmp_path, capsys, untrained):
    said = refusal(capsys, "--run", tmp_path, "--reference", made / "train", "--test", made / "train")
    assert "was made from the same digits as" in said


def test_a_test_set_of_another_size_is_refused(made, tmp_path, capsys, untrained):
    source = ["stackedmnist:" + str(made), "--split", "test", "--max-images", "20", "--workers", "1"]
    assert prepare.main([*source, "--out", str(tmp_path / "small"), "--size", "8"]) == 0
    capsys.readouterr()
    said = refusal(capsys, "--run", tmp_path, "--reference", made / "train", "--test", tmp_path / "small")
    assert "16 px and" in said and "with the same --size" in said


def test_samples_that_are_not_there_are_named_before_a_classifier_is_trained(made, tmp_path, capsys, untrained):
    given = ("--reference", made / "train", "--test", made / "test")
    assert "no such file or folder" in refusal(capsys, "--samples", tmp_path / "absent", *given)
    assert str(tmp_path) in refusal(capsys, "--run", tmp_path, *given)
