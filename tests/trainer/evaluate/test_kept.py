"""Statistics beside the data: written once, used while they are of these images and this network, and said to be."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.prepare.command import main as prepare
from tests.trainer.evaluate.scripted_networks import Plain, WithClasses, scripted
from trainer.evaluate import reference
from trainer.evaluate.command import main
from trainer.evaluate.reference import read_all
from trainer.sample.images import save_npz


@pytest.fixture
def data(tiny_digits: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_digits, tmp_path / "data"))


@pytest.fixture
def basis(data: Path, tmp_path: Path) -> list[str]:
    """Arguments for all commands."""
    network = scripted(WithClasses(), tmp_path / "net.pt")
    return ["--reference", str(data), "--network", str(network), "--cache", str(tmp_path / "cache")]


@pytest.fixture
def samples(tiny_digits: Path, tmp_path: Path) -> str:
    save_npz(tmp_path / "samples.npz", read_all(tiny_digits)[0][:100])
    return str(tmp_path / "samples.npz")


def test_statistics_are_kept_with_the_data_and_give_the_same_figures(
    data: Path, basis: list[str], samples: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def measured() -> tuple[dict, str]:
        capsys.readouterr()
        assert main(["--samples", samples, *basis, "--json"]) == 0
        out, err = capsys.readouterr()
        return json.loads(out), err

    before, said = measured()
    assert not said
    assert main(["--statistics", *basis]) == 0
    (file,) = data.glob("statistics-file-*.npz")
    assert f"{file}: statistics of 1797 images by net.pt" in capsys.readouterr().out
    with np.load(file) as archive:
        features = archive["features"].astype(np.float64)
        np.testing.assert_allclose(archive["mu"], features.mean(axis=0))
        np.testing.assert_allclose(archive["sigma"], np.cov(features.T))
    shutil.rmtree(tmp_path / "cache")
    seen: list[int] = []
    look = reference.see_over_ranks
    monkeypatch.setattr(reference, "see_over_ranks", lambda *a: seen.append(1) or look(*a))
    after, said = measured()
    assert after == before
    assert said == f"trainer.evaluate: the features of the reference are those in {file}\n"
    assert seen == [1]  # the samples alone
    assert main(["--statistics", *basis]) == 0
    assert "are there already" in capsys.readouterr().out
    # Other programs compare with mu and sigma of the same file.
    assert main(["--samples", samples, "--reference", str(file), *basis[2:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fid"] == pytest.approx(before["fid"])
    assert prepare(["digits", "--out", str(data), "--shard-samples", "1000"]) in (0, 2)
    assert file.is_file()


@pytest.mark.parametrize("fault", ["images", "damage"])
def test_statistics_that_do_not_fit_are_named_and_made_again(
    data: Path, basis: list[str], samples: str, tmp_path: Path, fault: str, caplog, capsys
) -> None:
    assert main(["--statistics", *basis]) == 0
    (file,) = data.glob("statistics-*.npz")
    if fault == "images":
        other = tmp_path / "other"
        assert prepare(["digits", "--out", str(other), "--size", "16"]) == 0
        shutil.copy(file, other)
        basis = ["--reference", str(other), *basis[2:]]
        file = other / file.name
    else:
        file.write_bytes(file.read_bytes()[:5000])
    told = {"images": "is of other images, and is not used", "damage": "is damaged, and is not used"}[fault]
    assert main(["--samples", samples, *basis]) == 0
    assert f"{file} {told}: python -m trainer.evaluate --statistics writes it again" in caplog.text
    caplog.clear()
    assert main(["--statistics", *basis]) == 0
    capsys.readouterr()
    assert main(["--samples", samples, *basis]) == 0
    assert "those in" in capsys.readouterr().err and not caplog.records[1:]


def test_statistics_of_another_network_are_left_alone(
    data: Path, basis: list[str], samples: str, tmp_path: Path, capsys
):
    assert main(["--statistics", *basis]) == 0
    basis[3] = str(scripted(Plain(), tmp_path / "plain.pt"))
    capsys.readouterr()
    assert main(["--samples", samples, *basis]) == 0
    assert not capsys.readouterr().err
    assert main(["--statistics", *basis]) == 0
    assert len([*data.glob("statistics-*.npz")]) == 2


def test_mistakes_with_statistics_end_with_code_2_and_one_line(basis: list[str], samples: str, capsys) -> None:
    for arguments, told in {
        ("--reference", samples, *basis[2:]): "is no prepared data set: --statistics keeps the statistics of one",
        (*basis, "--infinity"): "--statistics measures no samples: leave --picture",
        tuple(basis[2:]): "required: --reference",
    }.items():
        assert main(["--statistics", *arguments]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and told in err
