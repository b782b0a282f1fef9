"""A former name of a setting is refused where a person wrote it, and read where a run did."""

import json
from pathlib import Path

import pytest

from trainer.algorithm.schedules import Cosine
from trainer.config.draft import ConfigError
from trainer.config.io import from_dict, load_config, load_stored, to_dict
from trainer.config.renamed import RENAMED
from trainer.config.resume import check_resumable
from trainer.config.stages import stages_of
from trainer.config.strict_yaml import dump


@pytest.fixture
def stored() -> dict:
    """A config of a run that was written under the former names."""
    values = to_dict(load_config("digits", ["grids.interval_steps=null", "grids.num_images=5"]))
    grids = values.pop("grids")
    values["tracking"] |= {"sample_interval_steps": grids["interval_steps"], "num_samples": grids["num_images"]}
    return values


def refusal(config: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides)
    return str(caught.value)


HINTS = {"tracking.backend": ", a list; [] is the former none"}


@pytest.mark.parametrize("former", RENAMED)
def test_former_name_is_refused_with_its_place_and_the_present_one(former: str, tmp_path: Path):
    section, key = RENAMED[former].split(".")
    message = f"{former} is now called {section}.{key}: set {key} in the section {section}{HINTS.get(former, '')}"
    assert refusal("digits", f"{former}=4") == f"--set {former}=4: {message}"
    file = tmp_path / "mine.yaml"
    file.write_text(dump({"run": {"directory": "r"}}) + "tracking:\n  {}: 4\n".format(former.split(".")[1]))
    assert f"{file}:4: {message}" in refusal(str(file)).splitlines()


def test_what_a_run_has_written_is_read_under_former_names(stored: dict, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(dump(stored))
    before = json.dumps(stored)
    for config in (from_dict(stored), load_stored(tmp_path / "config.yaml")):
        assert (config.grids.interval_steps, config.grids.num_images) == (None, 5)
        assert config.tracking == load_config("digits").tracking
    assert json.dumps(stored) == before


@pytest.mark.parametrize(("former", "present"), [("none", ()), ("mlflow", ("mlflow",))])
def test_former_tracker_is_a_list_of_it_and_none_an_empty_one(stored: dict, former: str, present: tuple):
    del stored["tracking"]["backends"]
    stored["tracking"]["backend"] = former
    assert from_dict(stored).tracking.backends == present


def test_a_run_of_the_former_names_is_resumed_and_a_change_is_noted_under_the_present_ones(stored: dict):
    assert check_resumable(from_dict(stored), load_config("digits", ["grids.interval_steps=9"])) == (
        "grids.interval_steps: null -> 9 (it says only what is drawn)",
        "grids.num_images: 5 -> 100 (it says only what is drawn)",
    )


def test_a_weight_that_fell_to_zero_is_read_as_the_course_that_it_was(stored: dict):
    stored["training"]["reconstruction"] = {"weight": 2.0, "decay_images": 500, "distance": "square"}
    weights = ({"weight": 3.0}, {"decay_images": None}, {"distance": "absolute"}, {})
    for number, reconstruction in enumerate(weights):
        stored["stages"][f"stage{number}"] = {"images": 64, "training": {"reconstruction": reconstruction}}
    config = from_dict(stored)
    expected = [Cosine(start=3.0, end=0.0, decay_images=500), 2.0, *[Cosine(start=2.0, end=0.0, decay_images=500)] * 3]
    assert [stage.config.training.reconstruction.weight for stage in stages_of(config)] == expected
    stored["training"]["reconstruction"] = {"weight": 2.0, "decay_images": None}
    stored["stages"] = {}
    assert from_dict(stored).training.reconstruction.weight == 2.0


def test_a_setting_that_is_gone_is_refused_with_what_to_write_instead():
    assert refusal("digits", "training.reconstruction.decay_images=9") == (
        "--set training.reconstruction.decay_images=9: training.reconstruction.decay_images is no setting any more: "
        "training.reconstruction.weight may have a course instead: {start: ..., end: 0, decay_images: ...}"
    )
