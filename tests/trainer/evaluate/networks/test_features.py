"""Feature networks from files, and what codecs make of samples."""

import io

import pytest
import torch
from PIL import Image

from tests.trainer.evaluate.scripted_networks import Plain, WithClasses, scripted
from trainer.evaluate.networks.features import ScriptedNetwork, through
from trainer.evaluate.reference import see_over_ranks

IMAGES = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_and_classes_of_a_scripted_network(tmp_path):
    network = ScriptedNetwork(scripted(WithClasses(), tmp_path / "net.pt"))
    seen = see_over_ranks(network, enumerate(IMAGES.split(4)), None)
    means = IMAGES.float().mean(dim=(2, 3))
    torch.testing.assert_close(seen.features, means)
    assert seen.logits is not None
    torch.testing.assert_close(seen.logits.softmax(1), (means / 255).softmax(1))
    assert network.name.startswith("net.pt (SHA-256 ")


def test_a_network_without_classes_gives_features_alone_and_grey_images_become_rgb(tmp_path):
    network = ScriptedNetwork(scripted(Plain(), tmp_path / "plain.pt"))
    seen = network(IMAGES[:, :1])
    assert seen.logits is None
    torch.testing.assert_close(seen.features, IMAGES[:, :1].float().mean(dim=(2, 3)).expand(-1, 3))


def test_what_is_no_network_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.pt cannot be loaded as TorchScript"):
        ScriptedNetwork(tmp_path / "absent.pt")
    (tmp_path / "bad.pt").write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"bad\.pt cannot be loaded as TorchScript"):
        ScriptedNetwork(tmp_path / "bad.pt")


def test_jpeg_is_that_of_pillow_at_its_default_quality_and_png_changes_nothing():
    assert torch.equal(through("png")(IMAGES), IMAGES)
    assert torch.equal(through("none")(IMAGES), IMAGES)
    found = through("jpeg")(IMAGES)
    for image, ours in zip(IMAGES, found, strict=True):
        stream = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "JPEG")
        back = torch.frombuffer(bytearray(Image.open(stream).convert("RGB").tobytes()), dtype=torch.uint8)
        # Two decoders of one library may round colours apart by a level or two.
        assert (back.view(8, 8, 3).permute(2, 0, 1).int() - ours.int()).abs().max() <= 2
    assert not torch.equal(found, IMAGES)
    assert through("jpeg")(IMAGES[:, :1]).shape == (6, 1, 8, 8)
