"""Weights that start a run: ours, published ones, and files that are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.data.storage.full_disk import small_files
from tests.launch import ROOT
from trainer.checkpoint.snapshot import WeightsError, build_generator, load_initial_weights, save_snapshot, save_weights
from trainer.config.io import load_config

GOLDEN = ROOT / "tests" / "golden" / "generator_biggan_residual.npz"
SMALL = (
    "data.image_size=16",
    "data.image_channels=3",
    "data.num_classes=0",
    "generator.base_channels=8",
    "generator.channel_multipliers=[1, 2]",
    "generator.num_res_blocks=1",
    "generator.attention_resolutions=[8]",
    "generator.latent_dim=8",
    "generator.latent_embedding_dim=16",
    "generator.num_mapping_layers=2",
)


def test_weights_that_a_full_disk_does_not_take_are_an_error_of_the_system(tmp_path):
    file = tmp_path / "weights.safetensors"
    with small_files(1000), pytest.raises(OSError, match="too large") as raised:
        save_weights(file, {"a": torch.zeros(1000)}, {})
    assert raised.value.filename == str(file)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def config():
    return load_config("digits", SMALL)


def published_state() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as file:
        return {f"module.{k.removeprefix('sd/')}": torch.from_numpy(file[k]) for k in file if k.startswith("sd/")}


def test_a_published_file_gives_the_published_output(config, tmp_path):
    torch.save(published_state(), tmp_path / "netG.pth")
    generator = build_generator(config)
    load_initial_weights(generator, tmp_path / "netG.pth")
    with np.load(GOLDEN) as file:
        x_t, t, z, expected = (torch.from_numpy(file[name]) for name in ("x_t", "t", "z", "out"))
    assert json.loads(str(np.load(GOLDEN)["config"]))["nz"] == config.generator.latent_dim
    torch.testing.assert_close(generator(x_t, t, z), expected, atol=1e-4, rtol=0)


def test_a_snapshot_loads_into_a_generator_of_the_same_config(config, tmp_path):
    first, second = build_generator(config), build_generator(config)
    save_snapshot(tmp_path / "snapshot", first.state_dict(), config, 7)
    load_initial_weights(second, tmp_path / "snapshot" / "generator.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert load_config(str(tmp_path / "snapshot" / "config.yaml")) == config


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.json", b"{}", r"unknown kind of weights; allowed: \.safetensors, \.pth, \.pt"),
        ("weights.safetensors", b"nothing", "cannot be read"),
        ("weights.pth", b"nothing", "is refused|cannot be read"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused(config, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load_initial_weights(build_generator(config), tmp_path / name)


def test_a_pickle_is_refused_and_not_executed(config, tmp_path):
    trap = tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (trap,))

    torch.save({"weight": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="is refused: it holds more than tensors"):
        load_initial_weights(build_generator(config), tmp_path / "weights.pth")
    assert not trap.exists()


def test_weights_of_another_shape_or_name_are_named(config, tmp_path):
    state = build_generator(config).state_dict()
    name = next(iter(state))
    save_file({**state, name: torch.zeros(1, 2, 3)}, tmp_path / "shape.safetensors")
    with pytest.raises(WeightsError, match=rf"{name} has shape \(1, 2, 3\), this run's generator"):
        load_initial_weights(build_generator(config), tmp_path / "shape.safetensors")
    del state[name]
    save_file(state, tmp_path / "name.safetensors")
    with pytest.raises(WeightsError, match=rf"{name} is missing"):
        load_initial_weights(build_generator(config), tmp_path / "name.safetensors")


def test_a_published_state_of_other_settings_names_the_first_keys(config, tmp_path):
    state = published_state()
    state.pop(next(iter(state)))
    torch.save(state, tmp_path / "netG.pth")
    with pytest.raises(WeightsError, match="1 missing: "):
        load_initial_weights(build_generator(config), tmp_path / "netG.pth")


def test_weights_that_are_no_floating_point_numbers_are_refused(config, tmp_path):
    state = build_generator(config).state_dict()
    name = next(iter(state))
    save_file({**state, name: state[name].to(torch.int8)}, tmp_path / "int8.safetensors")
    with pytest.raises(WeightsError, match=rf"{name} is torch\.int8, but weights are floating point numbers"):
        load_initial_weights(build_generator(config), tmp_path / "int8.safetensors")


def test_a_bit_that_flipped_in_a_pth_file_is_found(config, tmp_path):
    file = tmp_path / "netG.pth"
    torch.save(build_generator(config).state_dict(), file)
    load_initial_weights(build_generator(config), file)
    content = bytearray(file.read_bytes())
    weights = max(torch.load(file).values(), key=torch.numel)
    content[content.index(weights.numpy().tobytes())] ^= 1  # between the tensors are bytes that no checksum covers
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"is damaged: .* differs from its checksum"):
        load_initial_weights(build_generator(config), file)
