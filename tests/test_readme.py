"""README and docs: commands are accepted as written, links have targets, and tables match the code."""

import argparse
import ast
import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.prepare import command as prepare
from tests.launch import ROOT, default_signals, environment, run_python
from tests.trainer.bench.in_process import InProcess
from tests.trainer.demo.served import untrained
from tests.trainer.runs import configure, train
from trainer.bench.trial import Ended
from trainer.checkpoint.snapshot import save_snapshot
from trainer.config.io import config_names, load_config
from trainer.evaluate import command as evaluate
from trainer.plan.cost import count_costs
from trainer.tune import command as tune

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
README, EVALUATION = PAGES["README.md"], PAGES["docs/evaluation.md"]


def lines_of(text: str) -> list[str]:
    """The lines of a page's indented blocks, with continuation lines joined and comments removed."""
    return [line.split("  #")[0].strip() for line in re.findall(r"(?m)^    (.+)$", text.replace("\\\n", " "))]


def commands(text: str) -> list[str]:
    """The lines that call this project's modules."""
    return [line for line in lines_of(text) if re.search(r" -m (trainer|data|cluster)\.", line)]


def arguments(text: str, module: str, number: int = 0) -> list[str]:
    """The arguments of `python -m MODULE` in its first command on a page, or in a later one."""
    line = [line for line in commands(text) if f"-m {module}" in line][number]
    return ["-m", *shlex.split(line[line.index(module) :])]


class Parsed(BaseException):
    """Raised once arguments are accepted, to end there."""


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, text in PAGES.items() for line in commands(text)])
def test_each_command_is_accepted_by_its_program(page: str, line: str, monkeypatch, capsys):
    parse = argparse.ArgumentParser.parse_args

    def stop_after_parsing(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise Parsed(parse(parser, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after_parsing)
    module, *words = shlex.split(line.rpartition(" -m ")[2])
    if (ROOT / module.replace(".", "/") / "command.py").exists():
        module = f"{module}.command"
    with pytest.raises(Parsed) as accepted:
        importlib.import_module(module).main([word for word in words if word != "..."])
        pytest.fail(f"{page}: {line}: {capsys.readouterr().err}")
    options = vars(accepted.value.args[0])
    if "config" in options:
        load_config(options["config"], options.get("set", []))


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str):
    named = re.findall(r"(?<![\w/.-])(?:trainer|models|data|cluster|tests|docs)/[\w/.-]+\.\w+", PAGES[page])
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.slow
def test_own_images_are_prepared_and_planned_by_the_two_commands(tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((290, 260)).save(photographs / f"{i}.jpg")
    line = [a.replace("~/photographs", str(photographs)) for a in arguments(README, "data.prepare")]
    done = run_python(line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    inspected = run_python(arguments(README, "data.prepare", 1), cwd=tmp_path)
    assert inspected.returncode == 0, inspected.stderr
    assert (tmp_path / "contact-sheet-mine.png").exists()
    planned = run_python([*arguments(README, "trainer.run"), "--dry-run"], cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "datasets/mine" in planned.stdout
    assert "not readable" not in planned.stdout


@pytest.mark.slow
def test_samples_are_drawn_and_measured_by_the_commands(tiny, tiny_digits, tmp_path, monkeypatch, capsys):
    for name in ("mine", "digits-fast"):
        train(configure(tiny, tmp_path / "runs" / name, "training.total_images=32"))
    done = run_python(arguments(README, "trainer.sample"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid.png").exists()
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "digits").symlink_to(tiny_digits)
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(arguments(EVALUATION, "trainer.evaluate")[2:]) == 0
    assert "samples    500 images, from runs/digits-fast" in capsys.readouterr().out


@pytest.fixture
def models(tiny, tmp_path, monkeypatch) -> Path:
    """A folder with untrained models of the names in README, and with images."""
    for name, more in (("mine", ()), ("pairs256", ("data.condition_channels=3",))):
        small = ("generator.channel_multipliers=[1]", "generator.attention_resolutions=[]")
        sets = ("diffusion.num_timesteps=2", "generator.num_res_blocks=1", *small, *more)
        generator, _, config = untrained([*tiny, *sets])
        save_snapshot(tmp_path / "runs" / name, generator.state_dict(), config, step=0)
    for name in ("drawings", "maps"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(tmp_path / name / "1.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "written"),
    [
        ("export", ("model/README.md", "model/model_index.json", "model/images.onnx")),
        ("edit", ("edited/1.png",)),
        ("translate", ("translated/1-3.png", "translated/1-mean.png", "translated/1-std.png")),
    ],
)
def test_what_can_be_done_with_a_model_is_done_by_the_commands(models, capsys, command, written):
    module = f"trainer.{command}.command" if command == "export" else f"trainer.{command}"
    assert importlib.import_module(module).main(arguments(README, f"trainer.{command}")[2:]) == 0
    assert capsys.readouterr().err == ""
    assert all((models / name).is_file() for name in written)


@pytest.mark.slow
def test_the_page_is_served_by_the_command(models):
    line = [sys.executable, *arguments(README, "trainer.demo")]
    with subprocess.Popen(
        line,
        cwd=models,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    ) as process:
        assert process.stdout
        address = process.stdout.readline().split()[0]
        with urllib.request.urlopen(f"{address}model", timeout=30) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")


@pytest.mark.slow
def test_the_fastest_settings_are_found_and_written_by_the_command(tmp_path, monkeypatch, capsys):
    """The measurements, which take hours on a GPU, are made up."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (256, 256)).save(tmp_path / "1.png")
    assert prepare.main([str(tmp_path), "--size", "256", "--out", "datasets/mine", "--workers", "0"]) == 0
    found = {"mfu": 0.5, "peak_memory_gib": 2.0, "first_step_s": 3.0, "images_per_s": 9.0}
    found |= {"time/data_s": 0.0, "time/d_s": 1.0}
    InProcess(monkeypatch).fails = lambda _: Ended(0, json.dumps(found), 1.0)
    assert tune.main(arguments(README, "trainer.tune")[2:]) == 0
    assert "train with them: python -m trainer.run --config ./best.yaml" in capsys.readouterr().out
    assert Path(load_config("best.yaml").data.path).resolve() == tmp_path / "datasets/mine"


@pytest.mark.parametrize(
    ("command", "number"), [("evaluate", 0), ("evaluate", 1), ("points", 0), ("ablation", 0), ("modes", 0)]
)
def test_arguments_of_what_measures_are_taken_and_only_the_data_are_missed(
    tmp_path, monkeypatch, capsys, command, number
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inception.pt").touch()
    module = "trainer.evaluate.command" if command == "evaluate" else f"trainer.{command}"
    assert importlib.import_module(module).main(arguments(EVALUATION, f"trainer.{command}", number)[2:]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path) in said or "runs/" in said or "inception.pt" in said
    assert "usage" not in said


@pytest.mark.slow
@pytest.mark.parametrize("name", config_names())
def test_table_of_configs_states_the_figures_of_the_dry_run(name):
    (row,) = [line for line in PAGES["docs/configs.md"].splitlines() if line.startswith(f"| `{name}`")]
    config = load_config(name)
    costs = count_costs(config)
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


def heading_anchors(text: str) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"(?m)^#+ (.+)$", text)}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_to_files_and_headings(page: str):
    broken = []
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in heading_anchors(file.read_text())):
            broken.append(target)
    assert not broken


def test_readme_links_to_every_page():
    linked = {target.partition("#")[0] for target in re.findall(r"\]\((docs/[^)]+\.md)", README)}
    assert linked == {page for page in PAGES if page.startswith("docs/")}


def test_readme_and_contributing_stay_short():
    assert README.count("\n") <= 130
    assert PAGES["CONTRIBUTING.md"].count("\n") <= 60


def test_list_of_folders_is_complete():
    listed = set(re.findall(r"(?m)^    ((?:trainer|models|data|cluster|tests)/(?:\w+/)*)  ", README))
    there = {f"{p.relative_to(ROOT)}/" for p in (ROOT / "trainer").iterdir() if p.is_dir() and p.name[0] != "_"}
    assert listed == {*there, "trainer/", "models/", "data/", "cluster/", "tests/"}


def test_direct_dependencies_are_named_with_their_reason():
    text = (ROOT / "pyproject.toml").read_text()
    names = set(re.findall(r'(?m)^    "([a-z0-9_-]+)[\[>]', text))
    rows = [line.split("|")[1] for line in PAGES["docs/dependencies.md"].splitlines() if line.startswith("|")]
    listed = {name for cell in rows for name in re.findall(r"[a-z0-9_-]+", cell)} - {"library"}
    assert {name for name in listed if name.strip("-")} == names


def test_glossary_explains_each_term_once():
    terms = re.findall(r"(?m)^\| (?!term )([^|]+) \|", PAGES["docs/glossary.md"].replace("\\|", ""))
    words = [word.strip(" `") for term in terms for word in term.split(",") if word.strip(" -")]
    assert sorted(words) == sorted(set(words))


def test_pictures_are_readable():
    for path in Path(ROOT / "docs/images").iterdir():
        assert path.suffix in {".png", ".svg"}
        if path.suffix == ".png":
            Image.open(path).verify()


# A line of a walk: number, file, definition, what happens there.
LINE = re.compile(r"(?m)^\d+\. `([\w/.]+)` `([\w.]+)`: (.+)$")
WALKS = {
    title: LINE.findall(text)
    for title, _, text in (section.partition("\n") for section in PAGES["docs/architecture.md"].split("\n## "))
    if title.startswith("A walk of ")
}


def definition(source: str, name: str) -> str | None:
    """The source of a function or class, such as `build` or `Loop.run`; None if there is none of that name."""
    scope: list[ast.stmt] = ast.parse(source).body
    found: ast.stmt | None = None
    for part in name.split("."):
        named = (node for node in scope if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part)
        if (found := next(named, None)) is None:
            return None
        scope = found.body
    return ast.get_source_segment(source, found) if found else None


def test_each_walk_has_ten_lines() -> None:
    assert {title: len(lines) for title, lines in WALKS.items()} == {"A walk of x0": 10, "A walk of a config key": 10}


@pytest.mark.parametrize(("path", "name", "text"), [line for lines in WALKS.values() for line in lines])
def test_the_place_exists_and_uses_the_words_of_its_line(path: str, name: str, text: str) -> None:
    source = (ROOT / path).read_text()
    if path.endswith(".yaml"):
        assert re.search(rf"(?m)^ +{name}: ", source)
        return
    code = definition(source, name)
    assert code is not None, f"{path} defines no {name}"
    words: list[str] = re.findall(r"`(\w+)`", text)
    missing = [word for word in words if not re.search(rf"\b{word}\b", code)]
    assert not missing, f"{path}: {name} does not mention {missing}"


def test_a_name_that_is_not_defined_is_found() -> None:
    source = "class A:\n    def f(self):\n        return x0\n"
    assert definition(source, "A.f") == "def f(self):\n        return x0"
    assert definition(source, "A.g") is None
    assert definition(source, "f") is None
