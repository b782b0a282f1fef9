import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.prepare.command import main as prepare
from trainer.evaluate import classifier
from trainer.evaluate.classifier import Evaluation, evaluate_samples, noise_images, train_classifier
from trainer.evaluate.command import main
from trainer.evaluate.quality import Quality
from trainer.evaluate.reference import read_all
from trainer.evaluate.report import render
from trainer.sample.images import save_folder, save_npz, to_uint8

Digits = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    assert prepare(["digits", "--out", str(folder), "--shard-samples", "1000"]) == 0
    return folder


@pytest.fixture(scope="module")
def digits(digits_folder: Path) -> Digits:
    images, labels = read_all(digits_folder)
    assert labels is not None
    return images, labels


@pytest.fixture(scope="module")
def reference(digits: Digits) -> Digits:
    """The first digits; the rest are real images that the classifier never sees."""
    return digits[0][:1400], digits[1][:1400]


@pytest.fixture(scope="module", autouse=True)
def one_training(request: pytest.FixtureRequest) -> Iterator[None]:
    """Train once for equal images and seed: the result would be the same bit for bit (test_classifier)."""
    known: dict[tuple[bytes, int], classifier.TrainedClassifier] = {}

    def train(images: torch.Tensor, labels: torch.Tensor, *, seed: int) -> classifier.TrainedClassifier:
        key = (images.numpy().tobytes() + labels.numpy().tobytes(), seed)
        if key not in known:
            known[key] = train_classifier(images, labels, seed=seed)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "train_classifier", train)
        yield


def test_noise_is_clipped_seeded_and_half_grey():
    noise = noise_images((50, 3, 16, 16), seed=1)
    assert torch.equal(noise, noise_images((50, 3, 16, 16), seed=1))
    assert not torch.equal(noise, noise_images((50, 3, 16, 16), seed=2))
    # N(0, 1) is beyond 1 with probability 0.1587 on each side; 38,400 pixels give it to +-0.006.
    assert (noise == 0).double().mean().item() == pytest.approx(0.1587, abs=0.01)
    assert (noise == 255).double().mean().item() == pytest.approx(0.1587, abs=0.01)
    assert noise.double().mean().item() == pytest.approx(127.5, abs=3.0)


def test_noise_that_is_drawn_in_batches_is_that_of_one_drawing():
    whole = torch.randn(600, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(noise_images((600, 3, 8, 8), seed=5), to_uint8(whole))


def test_samples_may_come_in_batches_of_which_two_are_held(digits: Digits, reference: Digits):
    held: list[weakref.ref] = []

    def batches() -> Iterator[torch.Tensor]:
        for first in range(1400, 1797, 50):
            assert sum(ref() is not None for ref in held) <= 2  # the first, and the last one, which is `batch` here
            batch = digits[0][first : first + 50].clone()
            held.append(weakref.ref(batch))
            yield batch

    found, whole = evaluate_samples(batches(), *reference, 0), evaluate_samples(digits[0][1400:], *reference, 0)
    assert found.num_samples == 397 and len(held) == 8
    assert found.class_shares == whole.class_shares and found.ratio == pytest.approx(whole.ratio, rel=1e-4)


def test_whole_data_set_is_read_in_order_with_its_labels(digits: Digits, digits_folder: Path):
    images, labels = digits
    assert images.shape == (1797, 1, 16, 16)
    assert labels.shape == (1797,)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    again, _ = read_all(digits_folder)
    assert torch.equal(images, again)


@pytest.mark.slow
def test_real_images_that_were_not_seen_score_far_better_than_noise(digits: Digits, reference: Digits):
    result = evaluate_samples(digits[0][1400:], *reference, 0)
    assert result.num_samples == 397
    assert result.num_reference == 1400
    assert result.classifier_accuracy >= 0.95
    assert result.ratio < 0.1
    assert result.ratio == result.frechet_samples / result.frechet_noise
    assert sum(result.class_shares) == pytest.approx(1.0)
    assert max(abs(a - b) for a, b in zip(result.class_shares, result.reference_class_shares, strict=True)) < 0.06


def test_noise_scores_like_noise(reference: Digits):
    result = evaluate_samples(noise_images((400, 1, 16, 16), seed=77), *reference, 0)
    assert result.ratio == pytest.approx(1.0, abs=0.1)


def test_samples_of_one_class_are_seen_in_the_class_shares(digits: Digits, reference: Digits):
    images, labels = digits
    collapsed = images[1400:][labels[1400:] == 7]
    mixed = evaluate_samples(images[1400:], *reference, 0)
    result = evaluate_samples(collapsed, *reference, 0)
    assert result.class_shares[7] > 0.9
    assert result.frechet_samples > 10 * mixed.frechet_samples


@pytest.mark.slow
def test_reference_as_samples_has_distance_zero(reference: Digits):
    result = evaluate_samples(reference[0], *reference, 0)
    assert result.frechet_samples < 1e-6 * result.frechet_noise


def test_same_seed_gives_the_same_figures_and_another_one_others(digits: Digits, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(classifier, "train_classifier", train_classifier)
    monkeypatch.setattr(classifier, "TRAINING_STEPS", 20)
    images, labels = digits[0][:200], digits[1][:200]
    first, second, other = (evaluate_samples(images[:50], images, labels, seed) for seed in (5, 5, 6))
    assert first == second
    assert first.ratio != other.ratio


def test_unlabelled_reference_is_refused_with_the_way_out(reference: Digits):
    with pytest.raises(ValueError, match=r"no labels, so no classifier .* write the samples to a \.npz file"):
        evaluate_samples(reference[0][:10], reference[0], None, 0)


def test_samples_of_another_shape_are_refused_with_both_shapes(reference: Digits):
    with pytest.raises(ValueError, match=r"\[10, 1, 8, 8\], the reference is torch.uint8 \[1400, 1, 16, 16\]"):
        evaluate_samples(reference[0][:10, :, :8, :8], *reference, 0)


def test_single_sample_and_negative_seed_are_refused(reference: Digits):
    with pytest.raises(ValueError, match="1 sample has no covariance: give at least 2"):
        evaluate_samples(reference[0][:1], *reference, 0)
    with pytest.raises(ValueError, match="seed is -1, expected 0 to"):
        evaluate_samples(reference[0][:2], *reference, -1)


def figures(num_classes: int) -> Evaluation:
    shares = tuple(1.0 if i == 3 else 0.0 for i in range(num_classes))
    return Evaluation(
        num_samples=256,
        num_reference=1797,
        seed=4,
        classifier_accuracy=0.99443,
        num_held_out=359,
        frechet_samples=1.25,
        frechet_noise=125.0,
        class_shares=shares,
        reference_class_shares=(1.0 / num_classes,) * num_classes,
        quality=Quality(fid=1.25, kid=0.5, inception_score=3.0, precision=0.25),
    )


def test_table_is_aligned_and_says_what_was_measured_and_how():
    text = render(figures(4), source="from a.npz", class_names=["cat", "dog", "eel", "fox"])
    assert text.splitlines() == [
        "samples    256 images, from a.npz",
        "reference  1797 images, all of the data set",
        "features   64 of a classifier trained on the data set (seed 4),",
        "           right on 99.44% of 359 held-out images",
        "",
        "Fréchet distance to the reference    samples     noise     ratio",
        "                                        1.25       125    0.0100",
        "",
        "kernel distance                          0.5",
        "class score, like Inception's              3",
        "precision                               0.25",
        "",
        "share of class                       samples reference",
        "cat                                     0.0%     25.0%",
        "dog                                     0.0%     25.0%",
        "eel                                     0.0%     25.0%",
        "fox                                   100.0%     25.0%",
    ]


def test_table_of_many_classes_is_summed_up():
    last = render(figures(1000), source="").splitlines()[-2:]
    assert last == [
        "classes    1 of 1000 seen among the samples",
        "           largest share 100.00% (3), in the reference 0.10%",
    ]


def test_asked_for_classes_are_held_against_what_the_classifier_sees(digits: Digits, reference: Digits):
    images, labels = digits[0][1400:], digits[1][1400:]
    asked = labels.clone()
    asked[labels == 7] = 8  # none of these is what was asked for
    found = evaluate_samples(images, *reference, 0, asked)
    assert found.agreement is not None and found.class_agreement is not None
    assert found.agreement == pytest.approx(1 - (labels == 7).double().mean().item(), abs=0.03)
    assert list(found.class_agreement) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert min(share for label, share in found.class_agreement.items() if label != 8) > 0.85
    eights = (labels == 8).sum() / (asked == 8).sum()
    assert found.class_agreement[8] == pytest.approx(eights.item(), abs=0.1)
    assert f"{found.class_agreement[8]:.1%} of class 8, the least" in render(found, source="")
    assert evaluate_samples(images, *reference, 0).agreement is None


def test_table_names_the_class_that_comes_out_least():
    found = replace(figures(3), agreement=0.75, class_agreement={0: 1.0, 2: 0.25})
    (line,) = (line for line in render(found, source="").splitlines() if "asked for" in line)
    assert line == "of the class that was asked for        75.0%, 25.0% of class 2, the least"


@pytest.mark.slow
def test_command_prints_table_or_json(
    digits: Digits, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_npz(tmp_path / "a.npz", digits[0][:300])
    save_folder(tmp_path / "pngs", digits[0][:300])
    assert main(["--samples", str(tmp_path / "a.npz"), "--reference", str(digits_folder)]) == 0
    table = capsys.readouterr().out
    assert f"samples    300 images, from {tmp_path / 'a.npz'}, measured through no file codec" in table
    assert main(["--samples", str(tmp_path / "pngs"), "--reference", str(digits_folder), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["source"] == f"from {tmp_path / 'pngs'} (PNG files), measured through no file codec"
    assert values["num_samples"] == 300
    assert f"{values['ratio']:.4f}" in table
    assert len(values["class_shares"]) == 10


def test_mistakes_end_with_code_2_and_one_line(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    absent = str(tmp_path / "absent")
    for arguments, message in {
        ("--samples", absent, "--reference", str(digits_folder)): "no such file or folder",
        ("--samples", absent, "--reference", absent): "no prepared data set at",
        ("--samples", absent): "--reference",
        ("--reference", absent): "--samples",
        (
            "--samples",
            absent,
            "--reference",
            absent,
            "--seed",
            "-1",
        ): "'-1' is given, allowed is a whole number",
    }.items():
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("trainer.evaluate: ")
        assert captured.err.count("\n") == 1
        assert message in captured.err


def test_command_refuses_an_unlabelled_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / "images" / f"{i}.png")
    assert prepare([str(tmp_path / "images"), "--out", str(tmp_path / "data"), "--size", "16"]) == 0
    capsys.readouterr()
    images, labels = read_all(tmp_path / "data")
    assert (len(images), labels) == (3, None)
    assert main(["--samples", str(tmp_path / "images"), "--reference", str(tmp_path / "data")]) == 2
    assert "the reference has no labels" in capsys.readouterr().err
