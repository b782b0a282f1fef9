"""Evaluations of a run: what cannot be measured is refused at its start, and ranks end together."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data.prepare import command as prepare
from data.storage.errors import UserError
from data.storage.location import DataError
from models.diffusion import Diffusion
from tests.data.servers import serve
from tests.launch import run_ranks
from tests.trainer.evaluate.scripted_networks import Plain, WithClasses, scripted
from tests.trainer.runs import configure
from trainer.checkpoint.snapshot import build_generator
from trainer.engine.ranks import Ranks
from trainer.evaluate.during_training import RunEvaluation, check_evaluation
from trainer.sample.images import save_npz

EVERY = ("evaluation.interval_images=16", "checkpoint.save_interval_steps=1")


def test_the_best_by_a_figure_that_the_network_does_not_give_is_refused_at_the_start(tiny, tmp_path):
    best = "checkpoint.keep_best=inception_score"
    for module, name in ((Plain(), "plain"), (WithClasses(), "classes")):
        file = scripted(module, tmp_path / f"{name}.pt")
        config = configure(tiny, tmp_path / name, *EVERY, best, f"evaluation.network={file}")
        if name == "classes":
            check_evaluation(config)
            continue
        with pytest.raises(UserError, match=r"keep_best is inception_score, which .*plain\.pt does not measure, as it"):
            check_evaluation(config)
        check_evaluation(configure(tiny, tmp_path / name, *EVERY, f"evaluation.network={file}"))


def test_the_best_by_a_figure_that_statistics_do_not_allow_is_refused_at_the_start(tiny, tmp_path):
    file = tmp_path / "statistics.npz"
    np.savez(file, mu=np.zeros(3), sigma=np.eye(3))
    sets = (*EVERY, f"evaluation.reference={file}")
    for best in ("kid", "coverage"):
        with pytest.raises(UserError, match=f"keep_best is {best}, which needs the images of the reference"):
            check_evaluation(configure(tiny, tmp_path / "run", *sets, f"checkpoint.keep_best={best}"))
    check_evaluation(configure(tiny, tmp_path / "run", *sets, "checkpoint.keep_best=fid"))


@pytest.fixture
def group_of_one() -> Iterator[Ranks]:
    ranks = Ranks.join("cpu", 60)
    yield ranks
    ranks.leave()


@pytest.mark.slow
def test_data_at_a_url_give_the_figures_of_the_folder(tiny, tiny_digits, group_of_one, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # or features would come from the cache
    file, figures = scripted(WithClasses(), tmp_path / "classes.pt"), {}
    with serve(tiny_digits) as server:
        for place in (str(tiny_digits), server.url, tiny_digits.as_uri()):
            sets = (*EVERY, f"evaluation.network={file}", f"data.path={place}", "evaluation.num_samples=128")
            config = configure(tiny, tmp_path / "run", *sets)
            check_evaluation(config)
            generator = build_generator(config).eval()
            for parameter in generator.parameters():
                torch.nn.init.constant_(parameter, 0.01)
            evaluation = RunEvaluation(config, group_of_one)
            figures[place] = evaluation.figures(generator, Diffusion.from_config(config.diffusion))
            shutil.rmtree(tmp_path / "ddgan")
        assert server.gets["index.json"]  # its shard may be in the cache of this host
        check_evaluation(configure(tiny, tmp_path / "run", *EVERY, f"evaluation.reference={server.url}"))
        with pytest.raises(DataError, match=r"nowhere/index\.json"):
            nowhere = f"{server.url}/nowhere"
            check_evaluation(configure(tiny, tmp_path / "run", *EVERY, f"evaluation.reference={nowhere}"))
    first, *others = figures.values()
    assert first["coverage"] >= 0 and others == [first, first]


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("lacks", ["index.json", "00000.tar"])
def test_pairs_that_one_rank_cannot_read_end_all_ranks_with_one_error(tiny, tmp_path, lacks):
    pairs, elsewhere = tmp_path / "pairs", tmp_path / "elsewhere"
    line = ["digits4x", "--out", str(pairs), "--size", "8", "--max-images", "40", "--workers", "0"]
    assert prepare.main(line) == 0
    shutil.copytree(pairs, elsewhere)
    Path(elsewhere, lacks).unlink()
    file = scripted(Plain(), tmp_path / "plain.pt")
    save_npz(tmp_path / "reference.npz", torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8))
    places = [str(file), str(tmp_path / "reference.npz"), str(pairs), str(elsewhere)]
    overrides = [*tiny, "data.condition_channels=1", f"run.directory={tmp_path / 'run'}"]
    # A rank that waited for the other one would do so for 300 s.
    done = run_ranks(2, ["-m", "tests.trainer.evaluate.one_rank_cannot_read", *places, *overrides], timeout_s=120)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert first == second
    assert first.startswith("DataError: ") and str(elsewhere) in first
