"""Every checkpoint of a run in one table; a card that can be checked."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.trainer.evaluate.scripted_networks import WithClasses, scripted
from tests.trainer.runs import configure, train
from trainer.evaluate.command import main
from trainer.evaluate.quality import Quality
from trainer.evaluate.reference import Measured
from trainer.evaluate.report import render_checkpoints
from trainer.export.command import export
from trainer.sample.draw import load_run, sample_images
from trainer.sample.images import save_npz


@pytest.fixture(scope="module")
def run(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 4, 6, 8 and 10."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    more = ("checkpoint.save_interval_steps=2", "checkpoint.keep_last=9", "training.learning_rate_g.peak=0.05")
    train(configure(tiny, folder, *more))
    return folder


@pytest.fixture(scope="module")
def basis(run: Path, tiny_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for all evaluations."""
    folder = tmp_path_factory.mktemp("network")
    network = scripted(WithClasses(), folder / "net.pt")
    arguments = ["--run", str(run), "--num", "20", "--reference", str(tiny_digits), "--network", str(network)]
    return [*arguments, "--cache", str(folder / "cache")]


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_every_checkpoint_is_measured_like_one_alone(
    run: Path, basis: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    every = printed([*basis, "--checkpoints", "all"], capsys)
    rows = every["checkpoints"]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert len({row["weights_sha256"] for row in rows}) == len({row["fid"] for row in rows}) == 5
    assert rows[-1]["images"] == 5 * rows[0]["images"] > 0
    newest = printed(basis, capsys)
    assert {name: rows[-1][name] for name in ("fid", "kid", "precision")} == {
        name: newest[name] for name in ("fid", "kid", "precision")
    }
    some = printed([*basis, "--checkpoints", "8,4"], capsys)
    assert some["checkpoints"] == [rows[1], rows[3]]
    alone = printed([*basis, "--checkpoint", "8"], capsys)
    assert {name: alone[name] for name in ("fid", "kid")} == {name: rows[3][name] for name in ("fid", "kid")}


def test_damaged_checkpoint_is_left_out_of_all_and_refused_by_its_step(
    run: Path, basis: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    file = next((copy / "checkpoints/step-00000004").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    arguments = ["--run", str(copy), *basis[2:]]
    assert main([*arguments, "--checkpoints", "all"]) == 0
    out, err = capsys.readouterr()
    assert "step 4 is left out: " in err and err.count("\n") == 1
    assert [line.split()[0] for line in out.splitlines()[5:]] == ["2", "6", "8", "10"]
    assert main([*arguments, "--checkpoints", "4"]) == 2
    assert main([*arguments, "--checkpoints", "5"]) == 2
    assert "has no checkpoint of step 5; it has [2, 4, 6, 8, 10]" in capsys.readouterr().err


def test_table_marks_the_smallest_distance() -> None:
    def measured(fid: float) -> Measured:
        quality = Quality(fid=fid, kid=0.5, recall=0.25)
        return Measured(
            quality=quality,
            num_samples=500,
            num_reference=1000,
            network="EfficientNet-Lite0",
            judge="lite0",
            through="none",
        )

    rows = [(10, 640, measured(3.0)), (20, 1280, measured(2.0)), (30, 1920, measured(2.5))]
    assert render_checkpoints(rows, source="from runs/a").splitlines() == [
        "samples    500 images of each checkpoint, from runs/a, measured through no file codec",
        "reference  1000 images",
        "features   EfficientNet-Lite0",
        "",
        "      step      images    FD-Lite0    KD-Lite0      recall",
        "        10         640           3         0.5        0.25",
        "        20        1280           2         0.5        0.25 *",
        "        30        1920         2.5         0.5        0.25",
    ]


def test_checkpoints_of_what_has_none_are_refused(
    basis: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_npz(tmp_path / "a.npz", torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    for arguments, message in {
        ("--samples", str(tmp_path / "a.npz"), *basis[2:], "--checkpoints", "all"): "--checkpoints needs --run",
        ("--samples", str(tmp_path / "a.npz"), *basis[2:], "--checkpoint", "best"): "--checkpoint needs --run",
        ("--samples", str(tmp_path / "a.npz"), *basis[2:], "--weights", "live"): "--weights live needs --run",
        (
            *basis,
            "--checkpoints",
            "worst",
        ): "'worst' is given, allowed are all, latest, best, and steps such as 100,200",
        (*basis, "--checkpoints", "best"): "checkpoint.keep_best names no curve",
    }.items():
        assert main([*arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_samples_of_seeds_are_measured_and_a_card_keeps_them(
    basis: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sample_images(*load_run(run), num=12, seed=0, seeds=[*range(3, 14), 40])
    save_npz(tmp_path / "a.npz", images)
    of_file = printed(["--samples", str(tmp_path / "a.npz"), *basis[4:]], capsys)
    arguments = [*basis[:2], *basis[4:], "--seeds", "3-13,40"]
    found = printed([*arguments, "--card", str(tmp_path / "card.json")], capsys)
    assert [found[name] for name in ("fid", "num_samples")] == [of_file[name] for name in ("fid", "num_samples")]
    assert "--seeds=3-13,40" in json.loads((tmp_path / "card.json").read_text())["command"]
    assert main(["--check", str(tmp_path / "card.json"), *basis[6:]]) == 0
    capsys.readouterr()
    for wrong, told in (
        ([*basis, "--seeds", "1-4"], "takes the place of --num"),
        ([*arguments[:-1], "7"], "two samples"),
    ):
        assert main(wrong) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_an_exported_model_is_measured_like_its_run(
    run: Path, basis: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(run, 8, tmp_path / "model", forms=("diffusers",))
    of_model = printed(["--run", str(tmp_path / "model"), *basis[2:]], capsys)
    (of_run,) = printed([*basis, "--checkpoints", "8"], capsys)["checkpoints"]
    assert [of_model[name] for name in ("fid", "kid")] == [of_run[name] for name in ("fid", "kid")]


@pytest.mark.slow
def test_live_weights_are_measured_and_named_in_the_card(basis: list[str], tmp_path: Path) -> None:
    cards = []
    for weights in ("live", "average"):
        file = tmp_path / f"{weights}.json"
        assert main([*basis, "--checkpoints", "latest", "--weights", weights, "--card", str(file)]) == 0
        cards.append(json.loads(file.read_text()))
    live, average = cards
    assert live["settings"]["weights"] == "live" and "--weights=live" in live["command"]
    assert "weights" not in average["settings"]
    assert live["results"][0]["step"] == average["results"][0]["step"] == 10
    assert live["results"][0]["weights_sha256"] != average["results"][0]["weights_sha256"]


@pytest.mark.slow
def test_card_is_checked_by_measuring_again(
    run: Path, basis: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "card.json"
    assert main([*basis, "--checkpoints", "2,10", "--card", str(card)]) == 0
    content = json.loads(card.read_text())
    assert [result["step"] for result in content["results"]] == [2, 10]
    assert content["settings"]["checkpoints"] == "2,10" and content["settings"]["num"] == 20
    assert f"--run={run}" in content["command"]
    capsys.readouterr()
    assert main(["--check", str(card)]) == 0
    assert "the same figures, of the same weights or samples, reference and network" in capsys.readouterr().err
    moved = shutil.copytree(run, tmp_path / "moved")
    assert main(["--check", str(card), "--run", str(moved)]) == 0
    assert main(["--check", str(card), "--seed", "5"]) == 1
    told = capsys.readouterr().err
    assert "step 2, fid: " in told and "weights_sha256" not in told
    content["results"][1]["weights_sha256"] = "0" * 64
    content["results"][0]["figures"]["kid"] *= 1.01
    content["reference"]["sha256"] = "1" * 64
    card.write_text(json.dumps(content))
    assert main(["--check", str(card)]) == 1
    told = [line.split(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert told == ["reference", "step 2, kid", "step 10, weights_sha256"]


def test_card_of_a_file_has_the_hash_of_its_images(
    basis: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = torch.randint(0, 256, (6, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_npz(tmp_path / "a.npz", images)
    card = tmp_path / "card.json"
    assert main(["--samples", str(tmp_path / "a.npz"), *basis[4:], "--card", str(card)]) == 0
    assert main(["--check", str(card)]) == 0
    images[0, 0, 0, 0] += 1
    save_npz(tmp_path / "a.npz", images)
    capsys.readouterr()
    assert main(["--check", str(card)]) == 1
    assert "samples_sha256: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read: "),
        ("[]", "is no card of format 1"),
        ('{"format": 2}', "is no card of format 1"),
        ('{"format": 1, "settings": {}}', "is damaged: settings, results, network or reference are missing"),
        (
            '{"format": 1, "settings": {"picture": "a"}, "results": [], "network": {}, "reference": {}}',
            "is damaged: the setting picture is 'a'",
        ),
        (
            '{"format": 1, "settings": {"num": true}, "results": [], "network": {}, "reference": {}}',
            "is damaged: the setting num is True",
        ),
        (
            '{"format": 1, "settings": {}, "results": [{}], "network": {}, "reference": {}}',
            "is damaged: a result has no figures",
        ),
        (
            '{"format": 1, "settings": {}, "results": [], "network": {}, "reference": {}}',
            "one of the arguments --samples --run --statistics --convert is required",
        ),
    ],
)
def test_what_is_no_card_is_refused_in_one_line(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "card.json").write_text(content)
    assert main(["--check", str(tmp_path / "card.json")]) == 2
    err = capsys.readouterr().err
    assert message in err or "the following arguments are required" in err
    assert err.count("\n") == 1
