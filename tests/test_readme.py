"""The README: its commands run as written, its tables and its list of files are those of the code."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.launch import ROOT, run_python
from tests.trainer.runs import configure, train
from trainer.config.cost import measure_costs
from trainer.config.io import config_names, load_config
from trainer.evaluate import command as evaluate

README = (ROOT / "README.md").read_text()


COMMANDS = ("run", "sample", "evaluate", "points", "ablation", "modes")


def commands() -> list[str]:
    """The lines of the indented blocks that call our modules, continuation lines joined, comments cut."""
    blocks = re.findall(r"(?m)^    (.+)$", README.replace("\\\n", " "))
    return [line.split("  #")[0].strip() for line in blocks if " -m " in line]


def arguments(module: str, number: int = 0) -> list[str]:
    """What follows `python -m MODULE` in its first command, or in a later one."""
    line = [line for line in commands() if f"-m {module}" in line][number]
    return ["-m", *shlex.split(line[line.index(module) :])]


def test_no_command_is_left_out_by_the_tests_below():
    modules = {re.search(r"-m ([a-z]+\.[a-z]+)", line).group(1) for line in commands()}  # pyright: ignore
    assert modules == {"data.prepare", "cluster.preflight", *(f"trainer.{name}" for name in COMMANDS)}


@pytest.mark.slow
def test_own_images_are_prepared_and_planned_by_the_two_commands(tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((290, 260)).save(photographs / f"{i}.jpg")
    prepare = [a.replace("~/photographs", str(photographs)) for a in arguments("data.prepare")]
    done = run_python(prepare, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    inspected = run_python(arguments("data.prepare", 1), cwd=tmp_path)
    assert inspected.returncode == 0, inspected.stderr
    assert (tmp_path / "contact-sheet-mine.png").exists()
    planned = run_python([*arguments("trainer.run"), "--dry-run"], cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "datasets/mine" in planned.stdout
    assert "not readable" not in planned.stdout


@pytest.mark.slow
def test_samples_are_drawn_and_measured_by_the_commands(tiny, tiny_digits, tmp_path, monkeypatch, capsys):
    for name in ("mine", "digits"):
        train(configure(tiny, tmp_path / "runs" / name, "training.total_images=32"))
    done = run_python(arguments("trainer.sample"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").exists()
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "digits").symlink_to(tiny_digits)
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(arguments("trainer.evaluate")[2:]) == 0
    assert "samples    500 images, from runs/digits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "number"), [("evaluate", 0), ("evaluate", 1), ("points", 0), ("ablation", 0), ("modes", 0)]
)
def test_arguments_of_what_measures_are_taken_and_only_the_data_are_missed(
    tmp_path, monkeypatch, capsys, command, number
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inception.pt").touch()
    module = "trainer.evaluate.command" if command == "evaluate" else f"trainer.{command}"
    assert importlib.import_module(module).main(arguments(f"trainer.{command}", number)[2:]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path) in said or "runs/" in said or "inception.pt" in said
    assert "usage" not in said


def test_submitted_command_names_a_config_and_fields_that_exist():
    (line,) = [line for line in commands() if line.startswith("ray job submit")]
    words = shlex.split(line)
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    config = load_config(words[words.index("--config") + 1], overrides)
    assert config.run.directory == "/shared/runs/mine"


@pytest.mark.slow
@pytest.mark.parametrize("name", config_names())
def test_table_of_configs_states_the_figures_of_the_dry_run(name):
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}`")]
    config = load_config(name)
    costs = measure_costs(config)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:5] == [
        str(config.data.image_size),
        str(config.diffusion.num_timesteps),
        str(config.training.global_batch_size),
    ]
    for cell, parameters, flops in (
        (cells[6], costs.parameters_g, costs.forward_g),
        (cells[7], costs.parameters_d, costs.forward_d),
    ):
        found = [float(number) for number in re.findall(r"\d+\.\d+", cell)]
        assert found == [pytest.approx(parameters / 1e6, abs=0.006), pytest.approx(flops / 1e9, abs=0.06)], cell


def test_list_of_pages_is_complete():
    listed = set(re.findall(r"(?m)^    (docs/[\w/]+\.md) ", README))
    assert listed == {str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md")}


def test_list_of_folders_is_complete():
    listed = set(re.findall(r"(?m)^    ((?:trainer|models|data|cluster|tests)/(?:\w+/)*)  ", README))
    there = {f"{p.relative_to(ROOT)}/" for p in (ROOT / "trainer").iterdir() if p.is_dir() and p.name[0] != "_"}
    assert listed == {*there, "trainer/", "models/", "data/", "cluster/", "tests/"}


def test_direct_dependencies_are_named():
    text = (ROOT / "pyproject.toml").read_text()
    names = set(re.findall(r'(?m)^    "([a-z0-9-]+)[\[>]', text))
    table = README[README.index("## Dependencies") :]
    assert not [name for name in names if not re.search(rf"\b{name}\b", table)]


def test_picture_is_there():
    for picture in re.findall(r"!\[.*\]\((.+)\)", README):
        assert Path(ROOT / picture).is_file()
