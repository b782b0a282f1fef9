"""`tracking.profile_steps`: a valid trace that names steps and updates, and changes nothing about the training."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("steps", ["[5, 4]", "[1, 21]", "[0, 3]", "[3]", "7", "[]"])
def test_steps_that_are_no_range_are_refused(tiny, tmp_path, steps) -> None:
    with pytest.raises(ConfigError, match=r"tracking.*profile_steps"):
        configure(tiny, tmp_path, f"tracking.profile_steps={steps}")
