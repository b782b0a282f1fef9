"""The command with published networks: names of their figures, weights that are converted or missing, infinity."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from trainer.evaluate.command import main
from trainer.evaluate.networks.published import PUBLISHED
from trainer.sample.images import save_npz

ALWAYS = {"precision", "recall", "density", "coverage"}


class Small(nn.Module):
    """In place of the published ones: 3 features and 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


@pytest.fixture
def basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for all evaluations; the networks are small, and their weights nowhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    offline = {
        id(p.weights): dataclasses.replace(p.weights, url="http://127.0.0.1:9/a/b.pth") for p in PUBLISHED.values()
    }
    for name, published in PUBLISHED.items():
        small = dataclasses.replace(published, build=Small, weights=offline[id(published.weights)])
        monkeypatch.setitem(PUBLISHED, name, small)
    generator = torch.Generator().manual_seed(0)
    for name, number in (("samples", 40), ("reference", 50)):
        images = torch.randint(0, 256, (number, 3, 8, 8), dtype=torch.uint8, generator=generator)
        save_npz(tmp_path / f"{name}.npz", images)
    torch.save(Small().state_dict(), tmp_path / "small.pth")
    return ["--samples", str(tmp_path / "samples.npz"), "--reference", str(tmp_path / "reference.npz")]


@pytest.mark.parametrize(
    ("network", "figures", "shown"),
    [
        ("inception", {"fid", "kid", "inception_score"}, "FID  "),
        ("inception-pytorch", {"fid", "kid", "inception_score"}, "FID  "),
        ("inception-clean", {"clean_fid", "clean_kid"}, "clean-FID  "),
        ("dinov2", {"fd_dinov2", "kd_dinov2"}, "FD-DINOv2  "),
    ],
)
def test_figures_are_named_as_the_field_names_them(
    network: str, figures: set[str], shown: str, basis: list[str], tmp_path: Path, capsys
) -> None:
    assert main(["--convert", str(tmp_path / "small.pth"), "--network", network]) == 0
    assert "not the published file, and results will say so" in capsys.readouterr().out
    assert main([*basis, "--network", network, "--infinity", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    (distance,) = (name for name in figures if name.endswith(("fid", "fd_dinov2")))
    given = {name for name, value in values.items() if isinstance(value, float)}
    assert given == figures | ALWAYS | {f"{distance}_infinity"}
    assert values["network"].startswith(PUBLISHED[network].title) and "(not the published file, " in values["network"]
    assert main([*basis, "--network", network, "--infinity"]) == 0
    table = capsys.readouterr().out
    assert f"\n{shown}" in table and f"\n{shown.strip()} at infinity  " in table


def test_a_card_repeats_the_extrapolation(basis: list[str], tmp_path: Path, capsys) -> None:
    assert main(["--convert", str(tmp_path / "small.pth"), "--network", "dinov2"]) == 0
    card = tmp_path / "card.json"
    assert main([*basis, "--network", "dinov2", "--infinity", "--card", str(card)]) == 0
    written = json.loads(card.read_text())
    assert written["command"].endswith("--infinity") and "fd_dinov2_infinity" in written["results"][0]["figures"]
    assert main(["--check", str(card)]) == 0
    written["results"][0]["figures"]["fd_dinov2_infinity"] += 1
    card.write_text(json.dumps(written))
    assert main(["--check", str(card)]) == 1
    assert "fd_dinov2_infinity" in capsys.readouterr().err


def test_mistakes_end_with_code_2_and_one_line(basis: list[str], tmp_path: Path, capsys) -> None:
    for arguments, told in {
        (*basis, "--network", "dinov2"): "the network dinov2 needs weights that could not be fetched",
        ("--convert", str(tmp_path / "small.pth")): "--convert needs --network, which is one of inception, ",
        ("--convert", str(tmp_path / "none.pth"), "--network", "dinov2"): "none.pth cannot be read",
        ("--convert", basis[1], "--network", "dinov2"): "unknown kind of weights; allowed: .safetensors, .pth, .pt",
    }.items():
        assert main(arguments) == 2
        *first, last = capsys.readouterr().err.splitlines()
        assert told in last and all("fetching" in line for line in first)
    assert main(["--convert", str(tmp_path / "small.pth"), "--network", "dinov2"]) == 0
    save_npz(tmp_path / "few.npz", torch.zeros(11, 3, 8, 8, dtype=torch.uint8))
    assert main(["--samples", str(tmp_path / "few.npz"), *basis[2:], "--network", "dinov2", "--infinity"]) == 2
    assert "at least 12 samples, four for each of 3 features, and 11 are given" in capsys.readouterr().err
