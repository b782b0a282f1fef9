"""References in every form, kept by hash; figures that do not depend on batches or ranks; the command, and a run."""

import dataclasses
import json
import weakref
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
import torch

from data.storage.errors import UserError
from tests.data.buckets import bucket
from tests.launch import run_python, run_ranks
from tests.trainer.evaluate.scripted_networks import Plain, WithClasses, scripted
from tests.trainer.refusals import make, refusals
from tests.trainer.runs import configure, train
from trainer.checkpoint.format import list_checkpoints
from trainer.config.sections import FIGURES, JudgeKind
from trainer.evaluate import reference as module
from trainer.evaluate.command import main
from trainer.evaluate.during_training import check_evaluation
from trainer.evaluate.networks.features import ScriptedNetwork, Seen
from trainer.evaluate.quality import Quality, Statistics, named, statistics_of
from trainer.evaluate.reference import FeaturesError, evaluate_against, load_reference, read_all, see_samples
from trainer.sample.images import save_folder, save_npz


class Tiles(torch.nn.Module):
    """Means of the quarters of an image: 12 features that differ from image to image, and four classes."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = torch.nn.functional.adaptive_avg_pool2d(img.to(torch.float32), 2).flatten(1)
        return x if return_features else torch.softmax(x[:, :4] / 20.0, dim=1)


@pytest.fixture(scope="module")
def network_file(tmp_path_factory):
    return scripted(Tiles(), tmp_path_factory.mktemp("net") / "tiles.pt")


def test_forms_of_a_reference_agree(tiny_digits, network_file, tmp_path):
    network = ScriptedNetwork(network_file)
    images, _ = read_all(tiny_digits)
    save_npz(tmp_path / "images.npz", images)
    save_folder(tmp_path / "pngs", images[:100])
    shards, array = (
        load_reference(p, network, None, tmp_path / "kept") for p in (tiny_digits, tmp_path / "images.npz")
    )
    assert isinstance(shards.seen, Seen) and isinstance(array.seen, Seen)
    torch.testing.assert_close(shards.seen.features, array.seen.features, atol=1e-3, rtol=1e-5)
    assert shards.num_images == array.num_images == 1797
    assert load_reference(tmp_path / "pngs", network, None, tmp_path / "kept").num_images == 100
    s = statistics_of(shards.seen.features)
    np.savez(tmp_path / "stats.npz", mu=s.mean.numpy(), sigma=s.covariance.numpy())
    statistics = load_reference(tmp_path / "stats.npz", network, None, tmp_path / "kept").seen
    assert isinstance(statistics, Statistics)
    assert torch.equal(statistics.covariance, s.covariance)


def test_reference_is_kept_by_a_hash_of_data_and_network_and_made_again_when_damaged(
    tiny_digits, network_file, tmp_path, monkeypatch
):
    first, network = (
        load_reference(tiny_digits, ScriptedNetwork(network_file), None, tmp_path),
        ScriptedNetwork(network_file),
    )
    (kept,) = tmp_path.iterdir()
    looked: list[int] = []
    look = module.see_over_ranks
    monkeypatch.setattr(module, "see_over_ranks", lambda *a: looked.append(1) or look(*a))
    again = load_reference(tiny_digits, network, None, tmp_path)
    assert isinstance(first.seen, Seen) and isinstance(again.seen, Seen)
    assert torch.equal(first.seen.features, again.seen.features)
    assert looked == []
    kept.write_bytes(kept.read_bytes()[:1000])
    load_reference(tiny_digits, network, None, tmp_path)
    assert looked == [1]
    load_reference(tiny_digits, ScriptedNetwork(scripted(Plain(), tmp_path.parent / "other.pt")), None, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_figures_do_not_depend_on_the_batches(tiny_digits, network_file, tmp_path):
    network = ScriptedNetwork(network_file)
    reference = load_reference(tiny_digits, network, None, tmp_path)
    images, _ = read_all(tiny_digits)
    whole = evaluate_against([(0, images[:300])], reference, network, None, codec="none", seed=0)
    parts = list(enumerate(images[:300].split(64)))[::-1]
    split = evaluate_against(parts, reference, network, None, codec="none", seed=0)
    assert split.quality.fid == pytest.approx(whole.quality.fid, rel=1e-4)
    assert split.quality.recall == whole.quality.recall
    assert split.num_samples == 300


def test_samples_are_seen_and_forgotten_batch_by_batch(network_file):
    held: list[weakref.ref] = []

    def batches() -> Iterator[tuple[int, torch.Tensor]]:
        for number in range(20):
            assert sum(ref() is not None for ref in held) <= 1  # `images`, the last one
            images = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
            held.append(weakref.ref(images))
            yield number, images

    assert len(see_samples(batches(), ScriptedNetwork(network_file), None, codec="jpeg").features) == 160


def test_statistics_of_another_network_are_refused(tiny_digits, network_file, tmp_path):
    reference = load_reference(tiny_digits, ScriptedNetwork(network_file), None, tmp_path)
    other = ScriptedNetwork(scripted(WithClasses(), tmp_path / "three.pt"))
    with pytest.raises(ValueError, match=r"the reference has 12 features, three\.pt .* gives 3"):
        evaluate_against([(0, read_all(tiny_digits)[0][:10])], reference, other, None, codec="none", seed=0)


def test_command_states_count_network_and_codec(tiny_digits, network_file, tmp_path, capsys):
    images, _ = read_all(tiny_digits)
    save_npz(tmp_path / "a.npz", images[:200])
    arguments = ["--samples", str(tmp_path / "a.npz"), "--reference", str(tiny_digits), "--cache", str(tmp_path / "c")]
    arguments += ["--network", str(network_file)]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "samples    200 images, from" in table and "measured through no file codec" in table
    assert "reference  1797 images" in table and "features   tiles.pt (SHA-256 " in table
    assert main([*arguments, "--through", "jpeg", "--json"]) == 0
    jpeg = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert (jpeg["through"], plain["through"], plain["num_samples"]) == ("jpeg", "none", 200)
    assert jpeg["fid"] != plain["fid"]
    assert {"kid", "inception_score", "precision", "recall", "density", "coverage"} <= plain.keys()
    for wrong, words in {
        ("--network", str(tmp_path / "none.pt")): "cannot be loaded as TorchScript",
        ("--reference", str(tmp_path / "nothing")): "no such file or folder",
    }.items():
        assert main([*arguments, *wrong]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_run_evaluates_every_so_many_images_and_keeps_the_best_checkpoint(tiny, network_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more = (
        "evaluation.interval_images=32",
        "evaluation.num_samples=40",
        f"evaluation.network={network_file}",
        "checkpoint.save_interval_steps=2",
        "checkpoint.keep_best=fid",
        "checkpoint.keep_last=1",
        "training.learning_rate_g.peak=0.05",
    )
    _, recorder = train(configure(tiny, tmp_path / "run", *more))
    fids = {step: metrics["fid"] for step, metrics in recorder.metrics.items() if "fid" in metrics}
    assert [*fids] == [2, 4, 6, 8, 10]
    assert len({*fids.values()}) == 5
    best = min(fids, key=lambda step: fids[step])
    kept = {c.step: c for c in list_checkpoints(tmp_path / "run" / "checkpoints")}
    assert {*kept} == {best, 10}
    assert kept[best].manifest["metrics"]["fid"] == fids[best]
    measured = ["--run", str(tmp_path / "run"), "--num", "40", "--reference", next(x for x in tiny if "path" in x)[10:]]
    assert main([*measured, "--network", str(network_file), "--cache", str(tmp_path / "c"), "--json"]) == 0


@pytest.mark.slow
def test_figures_of_one_step_are_not_said_of_another(tiny, network_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more = ("evaluation.interval_images=64", "evaluation.num_samples=20", f"evaluation.network={network_file}")
    train(configure(tiny, tmp_path / "run", *more, "checkpoint.save_interval_steps=2", "checkpoint.keep_last=9"))
    kept = {c.step: c.manifest["metrics"] for c in list_checkpoints(tmp_path / "run" / "checkpoints")}
    assert {step: "fid" in metrics for step, metrics in kept.items()} == {
        2: False,
        4: True,
        6: False,
        8: True,
        10: False,
    }


@pytest.mark.slow
def test_without_a_network_the_classifier_of_the_data_measures(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    more = ("evaluation.interval_images=64", "evaluation.num_samples=20", "training.total_images=64")
    _, recorder = train(configure(tiny, tmp_path / "run", *more))
    assert recorder.metrics[4].keys() == {field.name for field in dataclasses.fields(Quality)}


def test_best_by_a_figure_needs_an_evaluation_at_each_checkpoint():
    (line,) = refusals(checkpoint={"keep_best": "fid"})
    assert "evaluation.interval_images is null" in line
    evaluation = {"interval_images": 64 * 300}
    (line,) = refusals(checkpoint={"keep_best": "fid", "save_interval_steps": 1000}, evaluation=evaluation)
    assert "every 1000 x 64 images and an evaluation every 19200" in line
    make(checkpoint={"keep_best": "fid", "save_interval_steps": 600}, evaluation=evaluation)


@pytest.mark.slow
def test_lite0_during_training_has_curves_of_its_own_and_keeps_the_best_by_them(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_npz(tmp_path / "reference.npz", images)
    more = (
        "evaluation.interval_images=32",
        "evaluation.num_samples=8",
        "evaluation.network=lite0",
        f"evaluation.reference={tmp_path / 'reference.npz'}",
        "checkpoint.save_interval_steps=2",
        "checkpoint.keep_best=fd_lite0",
        "training.total_images=64",
    )
    config = configure(tiny, tmp_path / "run", *more)
    check_evaluation(config)
    _, recorder = train(config)
    assert recorder.metrics[4].keys() == named(Quality(fid=1.0), "lite0").keys()
    (kept,) = (c for c in list_checkpoints(tmp_path / "run" / "checkpoints") if c.step == 4)
    assert kept.manifest["metrics"]["fd_lite0"] == recorder.metrics[4]["fd_lite0"]


def test_best_by_a_figure_that_the_network_does_not_measure_is_refused():
    evaluation = {"interval_images": 64 * 600}
    for network, wrong, right in (
        ("lite0", "fid", "fd_lite0"),
        (None, "kd_lite0", "kid"),
        ("inception-clean", "fd_dinov2", "clean_fid"),
        ("inception-pytorch", "clean_kid", "kid"),
    ):
        checkpoint = {"save_interval_steps": 600, "keep_best": wrong}
        (line,) = refusals(checkpoint=checkpoint, evaluation=evaluation | {"network": network})
        assert f"keep_best is {wrong}, which evaluation.network {network or 'null'} does not measure" in line
        assert line.endswith(f"set it to {right}")
        make(checkpoint=checkpoint | {"keep_best": right}, evaluation=evaluation | {"network": network})
    make(checkpoint={"save_interval_steps": 600, "keep_best": "recall"}, evaluation=evaluation | {"network": "lite0"})


def test_names_of_the_curves_are_those_of_the_figures():
    judges = get_args(JudgeKind)
    assert {name for judge in judges for name in named(Quality(fid=1.0), judge)} == FIGURES


@pytest.mark.slow
@pytest.mark.multirank
def test_two_ranks_measure_what_one_does_and_download_a_checkpoint_once(
    tiny, tiny_digits, network_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    sets = ("training.total_images=64", "training.learning_rate_g.peak=0.05", "checkpoint.save_interval_steps=2")
    arguments = ["--run", str(tmp_path / "run"), "--num", "200", "--json", "--checkpoints", "all"]
    arguments += ["--reference", str(tiny_digits), "--network", str(network_file)]
    with bucket("measured", monkeypatch) as filesystem:
        train(configure(tiny, tmp_path / "run", *sets, "checkpoint.directory=s3://measured/run"))
        one = run_python(["-m", "trainer.evaluate", *arguments, "--cache", str(tmp_path / "one")], cwd=tmp_path)
        assert one.returncode == 0, one.stderr
        assert [row["step"] for row in json.loads(one.stdout)["checkpoints"]] == [2, 4]
        logged = ["-m", "tests.trainer.evaluate.logs_downloads", *arguments]
        two = run_ranks(2, [*logged, "--cache", str(tmp_path / "two")])
        assert two.returncode == 0, two.stderr
        assert json.loads(two.stdout) == json.loads(one.stdout)
        steps = [line.partition("/")[0] for line in two.stderr.splitlines() if line.startswith("downloads step-")]
        assert sorted(steps) == ["downloads step-00000002", "downloads step-00000004"]  # of one part each
        # A damaged one is left out by both ranks.
        (part,) = filesystem.glob("measured/run/step-00000004/*.safetensors")
        filesystem.pipe_file(part, bytes(filesystem.info(part)["size"]))
        two = run_ranks(2, [*logged, "--cache", str(tmp_path / "two")])
        assert [row["step"] for row in json.loads(two.stdout)["checkpoints"]] == [2]
        assert two.stderr.count("step 4 is left out") == 1
    assert not list(tmp_path.glob("ddgan-checkpoints-*/*"))


class NotANumber(torch.nn.Module):
    """Features that no distance can be measured in."""

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return img.to(torch.float32).flatten(2).mean(dim=2) * float("nan")


def test_features_that_are_not_finite_are_refused_and_no_perfect_distance(tiny_digits, tmp_path):
    broken = ScriptedNetwork(scripted(NotANumber(), tmp_path / "nan.pt"))
    reference = load_reference(tiny_digits, broken, None, tmp_path / "cache")
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(FeaturesError, match="features of the samples are not finite"):
        evaluate_against([(0, images)], reference, broken, None, codec="none", seed=0)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("evaluation.network=/nowhere.pt", "the feature network /nowhere.pt cannot be loaded as TorchScript"),
        ("evaluation.reference=/nowhere", "evaluation.reference is /nowhere, which does not exist"),
    ],
)
def test_an_evaluation_that_could_not_be_made_is_refused_before_the_start(tiny, tmp_path, setting, told):
    with pytest.raises(UserError, match=told):
        check_evaluation(configure(tiny, tmp_path / "run", "evaluation.interval_images=64", setting))
    check_evaluation(configure(tiny, tmp_path / "run", setting))  # no evaluations are asked for
