import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from trainer.evaluate import classifier as module
from trainer.evaluate.classifier import TrainedClassifier, train_classifier


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1797 digits at 16 px and their labels."""
    images, labels = load_digits(return_X_y=True)
    pictures = (Image.fromarray((x * 255 / 16).astype(np.uint8)) for x in images.reshape(-1, 8, 8))
    enlarged = np.stack([np.array(picture.resize((16, 16), Image.Resampling.BICUBIC)) for picture in pictures])
    return torch.from_numpy(enlarged)[:, None], torch.from_numpy(labels).long()


@pytest.fixture(scope="module")
def trained(digits: tuple[torch.Tensor, torch.Tensor]) -> TrainedClassifier:
    return train_classifier(*digits, seed=0)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRAINING_STEPS", 5)


def made(*, size: int = 8, channels: int = 1, number: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (number, channels, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.arange(number) % 3


@pytest.mark.slow
def test_digits_are_told_apart(trained: TrainedClassifier):
    assert trained.accuracy >= 0.97
    assert trained.num_held_out == 359


def test_features_and_logits_have_one_row_per_image(trained: TrainedClassifier, digits: tuple[torch.Tensor, ...]):
    assert trained.features(digits[0]).shape == (1797, 64)
    assert trained.logits(digits[0]).shape == (1797, 10)


def test_logits_are_the_last_layer_of_the_features(trained: TrainedClassifier, digits: tuple[torch.Tensor, ...]):
    head = trained.model.head
    with torch.no_grad():
        assert torch.equal(head(trained.features(digits[0][:100])), trained.logits(digits[0][:100]))


def test_features_of_an_image_do_not_depend_on_the_others(trained: TrainedClassifier, digits: tuple[torch.Tensor, ...]):
    alone = torch.cat([trained.features(image[None]) for image in digits[0][:4]])
    # Convolutions of another batch size may add up in another order.
    torch.testing.assert_close(alone, trained.features(digits[0])[:4], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("few_steps")
def test_same_seed_gives_the_same_weights_bit_for_bit():
    first, second = (train_classifier(*made(), seed=3) for _ in range(2))
    weights = second.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.model.state_dict().items())
    assert first.accuracy == second.accuracy


@pytest.mark.usefixtures("few_steps")
def test_another_seed_gives_other_weights():
    first, second = (train_classifier(*made(), seed=seed) for seed in (3, 4))
    assert not torch.equal(first.model.head.weight, second.model.head.weight)


@pytest.mark.usefixtures("few_steps")
def test_random_state_of_the_caller_is_left_alone():
    before = torch.get_rng_state()
    train_classifier(*made(), seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 13, 16, 28, 32, 48, 64])
def test_sizes_from_8_to_64_pixels_are_taken(size: int, channels: int):
    images, labels = made(size=size, channels=channels)
    result = train_classifier(images, labels, seed=0)
    assert result.features(images).shape == (40, 64)
    assert result.logits(images).shape == (40, 3)
    assert result.num_held_out == 8


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (made(size=7)[0], made()[1], "H = W of at least 8"),
        (made(channels=9)[0], made()[1], "C = 1 to 8"),
        (made()[0].float(), made()[1], r"torch.float32 .*, the classifier takes uint8"),
        (made()[0], made()[1][:30], r"labels are torch.int64 \[30\], expected int64 \[40\]"),
        (made(number=9)[0], made(number=9)[1], "9 images are too few .* at least 10"),
        (made()[0], made()[1] - 1, "labels contain -1, classes count from 0"),
    ],
)
def test_unusable_images_and_labels_are_refused(images: torch.Tensor, labels: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        train_classifier(images, labels, seed=0)
