"""A run of pairs: it resumes exactly, translates files and data sets, and says what it cannot do."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data.prepare import command as prepare
from data.shards.index import load_index
from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer import edit, translate, walk
from trainer.config.io import load_config
from trainer.evaluate import command as evaluate
from trainer.plan.cost import count_costs
from trainer.sample import command as sample
from trainer.sample.conditions import PreparedPairs, as_pictures, given_pairs
from trainer.sample.draw import load_run, sample_images
from trainer.sample.fidelity import Fidelity

PAIRS = ("data.condition_channels=1", "training.learning_rate_g.peak=0.05", "grids.num_images=32")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The digits at 8 px, each with itself at 4."""
    folder = tmp_path_factory.mktemp("data") / "pairs"
    line = ["digits4x", "--out", str(folder), "--size", "8", "--max-images", "50", "--shard-samples", "20"]
    assert prepare.main([*line, "--workers", "0"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tiny, pairs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "whole"
    train(configure(tiny, directory, *PAIRS, f"data.path={pairs}", "training.condition_dropout=0.2"))
    return directory


@pytest.mark.slow
def test_a_stopped_run_of_pairs_equals_the_whole_one(tiny, pairs, run, tmp_path):
    config = configure(tiny, tmp_path, *PAIRS, f"data.path={pairs}", "training.condition_dropout=0.2")
    train(config, Stopper(at=4))
    train(config)
    assert_same_state(state_of(tmp_path, 10), state_of(run, 10))


@pytest.mark.slow
def test_the_gaussian_method_takes_conditions_as_well(tiny, pairs, tmp_path):
    more = (*PAIRS, f"data.path={pairs}", "training.total_images=32")
    config = configure(tiny, tmp_path, *more, "training.objective=gaussian")
    train(config)
    loaded = load_run(tmp_path)
    with given_pairs(config) as given:
        images = sample_images(*loaded, num=4, seed=0, **given)
    assert images.shape == (4, 1, 8, 8)


@pytest.mark.slow
def test_the_grid_shows_what_is_given_the_image_and_results(run, pairs):
    grid = np.asarray(Image.open(run / "samples" / "step-00000010.png"))
    with PreparedPairs(pairs, load_run(run)[2]) as prepared:
        images, conditions, _ = prepared.read(range(4))
    scale = 512 // 64
    for row in range(4):
        y, step = row * (8 * scale + 2), 8 * scale + 2
        given, image = (grid[y : y + 8 * scale : scale, x : x + 8 * scale : scale] for x in (0, step))
        assert np.array_equal(given, conditions[row, 0].numpy())
        assert np.array_equal(image, images[row, 0].numpy())


@pytest.mark.slow
def test_results_depend_on_weights_seed_input_and_their_number_alone(run, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    line = ["--run", str(run), "--input", str(pairs), "--out", str(out), "--max-inputs", "23", "--num", "3"]
    assert translate.main(line) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("means over 23 pairs")
    assert [row[:23].strip() for row in lines[1:4]] == ["a result", "the mean of its results", "what was given"]
    assert lines[-1] == f"23 inputs: {out}"
    results = [np.asarray(Image.open(out / f"000007-{k}.png")) for k in range(3)]
    assert not np.array_equal(results[0], results[1])
    levels = np.stack(results).astype(np.float32)
    assert np.array_equal(np.asarray(Image.open(out / "000007-mean.png")), levels.mean(axis=0).round())
    assert np.array_equal(np.asarray(Image.open(out / "000007-std.png")), levels.std(axis=0).round())
    # The same condition alone, from a file.
    with PreparedPairs(pairs, load_run(run)[2]) as prepared:
        condition = prepared([7])[0, 0].numpy()
    Image.fromarray(condition).save(tmp_path / "seven.png")
    alone = ["--run", str(run), "--input", str(tmp_path / "seven.png"), "--num", "1"]
    assert translate.main([*alone, "--out", str(tmp_path / "alone")]) == 0
    assert [file.name for file in (tmp_path / "alone").iterdir()] == ["seven.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "alone" / "seven.png")), results[0])
    assert translate.main([*alone, "--out", str(tmp_path / "guided"), "--guidance", "3"]) == 0
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "guided" / "seven.png")), results[0])


@pytest.mark.slow
def test_samples_of_the_pairs_are_measured(run, pairs, capsys):
    line = ["--run", str(run), "--reference", str(pairs), "--num", "20"]
    assert evaluate.main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_samples"] == 20
    with PreparedPairs(pairs, load_run(run)[2]) as prepared:
        images, conditions, _ = prepared.read(range(20))
        drawn = sample_images(*load_run(run), num=20, seed=0, conditions=prepared)
    fidelity = Fidelity()
    fidelity.add(images, drawn[:, None], conditions)
    assert {name: found[name] for name in fidelity.named()} == {
        name: pytest.approx(value) for name, value in fidelity.named().items()
    }
    assert evaluate.main([*line, "--network", "classifier", "--card", str(run / "card.json")]) == 0
    assert fidelity.table() in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "more"),
    [
        (sample.main, ["--num", "2", "--out", "a.png"]),
        (walk.main, ["--seeds", "0,1", "--frames", "4", "--out", "a.webp"]),
        (edit.main, ["--image", "a.png", "--variations", "--start-step", "1", "--out", "b"]),
    ],
)
def test_commands_that_draw_without_a_condition_name_the_one_that_translates(
    run, tmp_path, monkeypatch, capsys, main, more
):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8)).save("a.png")
    assert main(["--run", str(run), *more]) == 2
    assert "this run translates images, and needs some to translate: python -m trainer.translate" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_mistakes_are_named_and_bad_inputs_are_left_out(run, tiny_digits, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no image")
    Image.new("L", (4, 4)).save(tmp_path / "b.png")
    new = tmp_path / "new"

    def said(*words: object) -> tuple[int, str]:
        code = translate.main(["--run", str(run), "--num", "2", *map(str, words)])
        return code, capsys.readouterr().err

    out = tmp_path / "out"
    code, text = said("--input", tmp_path, "--out", out)
    assert code == 1
    assert text.startswith(f"left out: {tmp_path}/a.png: is no image of a known format")
    assert sorted(file.name for file in out.iterdir()) == ["b-0.png", "b-1.png", "b-mean.png", "b-std.png"]
    file = tmp_path / "b.png"
    for words, told in (
        (("--input", tmp_path, "--out", out), "the folder is not empty"),
        (("--input", tiny_digits, "--out", new), "image_channels 1, condition_channels 0, but the run image_size 8"),
        (("--input", tmp_path / "nowhere", "--out", new), "there is no such file or folder"),
        (("--input", file, "--out", new, "--class", 3), "allowed: none, this run has no classes"),
        (("--input", file, "--out", new, "--guidance", "-1"), "allowed: 0 to 100"),
        (("--input", file, "--out", f"{new}.png"), "give the name of a folder, without a suffix"),
    ):
        code, text = said(*words)
        assert (code, told in text) == (2, True), text
    assert not new.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits4x", "pairs256"])
def test_the_networks_of_a_config_of_pairs_have_a_few_weights_more_and_a_step_is_counted(name):
    config = load_config(name)
    plain = load_config(name, ["data.condition_channels=0", "training.condition_dropout=0"])
    given, without = count_costs(config), count_costs(plain)
    assert 0 < given.parameters_g - without.parameters_g < 0.01 * without.parameters_g
    assert given.forward_d > without.forward_d


def test_conditions_are_shown_with_the_channels_of_an_image():
    rgb, five = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8), torch.zeros(2, 5, 4, 4, dtype=torch.uint8)
    assert as_pictures(rgb, 3) is rgb
    assert torch.equal(as_pictures(rgb, 1)[:, 0], rgb.float().mean(1).round().to(torch.uint8))
    assert as_pictures(five, 3).shape == (2, 3, 4, 4)


def test_an_index_tells_the_shape_of_a_sample(pairs):
    assert load_index(pairs).pixels_shape == (8, 8, 2)
