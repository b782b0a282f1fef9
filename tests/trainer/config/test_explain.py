"""Settings are explained from their docstrings, and the files made of them are those of the code."""

import json

import jsonschema
import pytest

from tests.launch import ROOT
from trainer.config.draft import ConfigError
from trainer.config.explain import entries, explain, schema
from trainer.config.io import CONFIG_FOLDER, config_names, flat, load_config
from trainer.config.strict_yaml import parse
from trainer.run import main


def test_every_setting_has_a_text_of_plain_sentences():
    settings = {entry.name: entry for entry in entries() if not entry.is_section}
    of_stages = [f"stages.NAME.{name}" for name in ("images", "training", "diffusion", "discriminator")]
    assert [name for name in settings if name.startswith("stages.")] == of_stages
    assert [name for name in settings if name not in of_stages] == list(flat(load_config("cifar10")))
    for entry in entries():
        assert len(entry.text) > 15, entry.name
        assert entry.text[-1] in ".)", entry.name


def test_page_of_settings_is_the_output_of_the_command():
    assert (ROOT / "docs" / "settings.md").read_text() == f"{explain()}\n", (
        "write it again: python -m trainer.run --explain > docs/settings.md"
    )


def test_schema_in_the_repository_is_the_output_of_the_command():
    assert (CONFIG_FOLDER / "schema.json").read_text() == f"{schema()}\n", (
        "write it again: python -m trainer.run --schema > trainer/configs/schema.json"
    )


def test_setting_is_explained_with_type_range_default_and_text():
    assert explain("training.r1_interval_steps") == (
        "- `training.r1_interval_steps`: a whole number > 0, or null (default: null)\n"
        "  Apply R1 and R2 only at every n-th step: 0, n, 2n, ... null: at every step."
    )
    assert explain("data.path").startswith("- `data.path`: text (no default)\n  Folder or URL of a data set")


def test_section_is_explained_with_all_that_it_holds():
    text = explain("training")
    assert text.startswith("## training\n\nThe optimization: ")
    assert "### training.adam\n\nOptimizer of both networks.\n\n- `training.adam.beta1`: " in text
    assert "`run." not in text
    assert explain("training.adam") in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trainig", "there is no setting trainig; did you mean `training`? Sections: run, data, training, "),
        (
            "training.r1_gama",
            "there is no setting training.r1_gama; did you mean `training.r1_gamma`? In training: ",
        ),
        ("r1_gamma", "there is no setting r1_gamma; did you mean `training.r1_gamma`? Sections: run, "),
        ("qqq", "there is no setting qqq. Sections: run, "),
        ("run.seed.x", "there is no setting run.seed.x; did you mean `run.seed`? Sections: run, "),
        ("tracking.num_samples", "tracking.num_samples is now called grids.num_images"),
    ],
)
def test_wrong_name_is_refused_with_the_nearest(name, message, capsys):
    with pytest.raises(ConfigError) as caught:
        explain(name)
    assert str(caught.value).startswith(message)
    with pytest.raises(SystemExit) as ended:
        main(["--explain", name])
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"{caught.value}\n")


@pytest.mark.parametrize(("arguments", "text"), [(["--explain", "grids"], explain("grids")), (["--schema"], schema())])
def test_explanation_and_schema_need_no_config(arguments, text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert capsys.readouterr() == (f"{text}\n", "")


def test_configs_fit_the_schema_and_a_wrong_one_does_not():
    validator = jsonschema.Draft202012Validator(json.loads(schema()))
    for name in config_names():
        config = parse((CONFIG_FOLDER / f"{name}.yaml").read_text()).value
        validator.validate(config)
        for wrong in ({"r1_gama": 1}, {"r1_gamma": -1}, {"r1_gamma": "big"}, {"adam": {"beta1": 1}}):
            assert not validator.is_valid(config | {"training": config["training"] | wrong}), wrong


def test_schema_describes_every_section_and_setting():
    tree = json.loads(schema())
    for definition in (tree, *tree["$defs"].values()):
        assert definition["description"]
        assert definition["additionalProperties"] is False
        assert all(part["description"] for part in definition["properties"].values() if "$ref" not in part)
