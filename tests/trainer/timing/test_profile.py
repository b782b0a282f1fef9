"""`tracking.profile_steps`: a valid trace that names steps and updates, and changes nothing about the training."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.launch import run_python, run_ranks
from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer.config.draft import ConfigError

pytestmark = pytest.mark.slow


def ranges(directory: Path) -> dict[str, Counter[str]]:
    """How often each named range is in each trace of a run."""
    found = {}
    for file in sorted((directory / "profile").iterdir()):
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        found[file.name] = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    return found


@pytest.fixture(scope="module")
def traced(tiny, tmp_path_factory) -> Path:
    """A run that is stopped after step 5 of the profiled 4 to 6, and resumed."""
    directory = tmp_path_factory.mktemp("run")
    config = configure(tiny, directory, "training.total_images=128", "tracking.profile_steps=[4, 6]")
    assert train(config, Stopper(5))[0].step == 5
    assert train(config)[0].finished
    return directory


def test_trace_names_the_steps_and_the_updates_and_a_resumed_run_traces_what_is_left(traced) -> None:
    first, second = ranges(traced).values()
    assert list(ranges(traced)) == ["rank-0-steps-4-5.json.gz", "rank-0-steps-6-6.json.gz"]
    assert {"step 4", "step 5"} == {name for name in first if name.startswith("step ")}
    assert first["update D"] == first["update G"] == first["data"] == 2
    assert {"step 6"} == {name for name in second if name.startswith("step ")}
    assert second["update D"] == second["update G"] == 1


def test_trace_changes_no_bit_of_the_training(tiny, tmp_path, traced) -> None:
    train(configure(tiny, tmp_path, "training.total_images=128"))
    assert_same_state(state_of(tmp_path, 8), state_of(traced, 8))
    assert not (tmp_path / "profile").exists()


@pytest.mark.multirank
def test_every_rank_writes_a_trace_if_asked(tiny, tmp_path) -> None:
    sets = (*tiny, f"run.directory={tmp_path}", "training.total_images=32", "engine.backend=torch")
    sets = (*sets, "tracking.profile_steps=[2, 2]", "tracking.profile_ranks=all")
    done = run_ranks(2, ["-m", "trainer.worker", "--config", "digits", *(x for o in sets for x in ("--set", o))])
    assert done.returncode == 0, done.stderr[-3000:]
    assert {name: found["update G"] for name, found in ranges(tmp_path).items()} == {
        "rank-0-steps-2-2.json.gz": 1,
        "rank-1-steps-2-2.json.gz": 1,
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_trace_of_a_gpu_has_kernels_and_comes_with_the_memory(tiny, tmp_path) -> None:
    more = ("scaling.device=gpu", "training.total_images=48", "tracking.profile_steps=[2, 3]")
    sets = (*tiny, f"run.directory={tmp_path}", "engine.backend=torch", *more)
    done = run_python(["-m", "trainer.worker", "--config", "digits", *(x for o in sets for x in ("--set", o))])
    assert done.returncode == 0, done.stderr[-3000:]
    trace, memory = sorted((tmp_path / "profile").iterdir(), key=lambda file: file.suffix)
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("cat") == "kernel" for event in events) > 100
    assert memory.name == "rank-0-steps-2-3-memory.pickle"
    assert memory.stat().st_size > 1000


@pytest.mark.parametrize("steps", ["[5, 4]", "[1, 21]", "[0, 3]", "[3]", "7", "[]"])
def test_steps_that_are_no_range_are_refused(tiny, tmp_path, steps) -> None:
    with pytest.raises(ConfigError, match=r"tracking.*profile_steps"):
        configure(tiny, tmp_path, f"tracking.profile_steps={steps}")
