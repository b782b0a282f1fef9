"""The rules of the layout: which way imports run, which file a library may enter by, how long a file gets."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.launch import ROOT

ARROWS = {
    "models": set[str](),
    "data": set[str](),
    "trainer": {"models", "data"},
    "cluster": {"trainer", "models", "data"},
    "tests": {"cluster", "trainer", "models", "data"},
}
"""What each package may import of ours, beside itself."""
DOORS = {
    "deepspeed": r"trainer/engines\w*\.py|trainer/checkpoint\.py",
    "mlflow": r"trainer/tracking\.py",
    "ray": r"trainer/run\.py|trainer/ray_adapter\.py|cluster/preflight\.py",
    "webdataset": r"data/.+\.py",
}
"""The files that may import a library; tests may too."""
MAX_LINES = 400
# Put together from halves, so that this file does not hold them.
UNFINISHED = re.compile(rf"\b(TO{'DO'}|FIX{'ME'}|XX{'X'}|HA{'CK'}|raise NotImple{'mented'}(?:Error)?)\b")


@dataclass(frozen=True)
class Imported:
    """One module that a file imports, wherever in the file."""

    line: int
    module: str

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def imports_of(source: str, path: str) -> Iterator[Imported]:
    """Every import, also in functions, under TYPE_CHECKING, relative, and by a name given to importlib."""
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            yield from (Imported(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            for module in [node.module] if node.module else [alias.name for alias in node.names]:
                yield Imported(node.lineno, ".".join([*base, module]))
        elif isinstance(node, ast.Call):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                    args=[ast.Constant(value=str(module)), *_],
                ):
                    yield Imported(node.lineno, module)


def violations(source: str, path: str) -> list[str]:
    """What a file imports against the arrows or past a door, each as `path:line: words`."""
    package = path.split("/")[0]
    found = []
    for imported in imports_of(source, path):
        if imported.top in ARROWS and imported.top not in {package, *ARROWS[package]}:
            found.append(f"{path}:{imported.line}: {package} must not import {imported.module}")
        door = DOORS.get(imported.top)
        if door and package != "tests" and not re.fullmatch(door, path):
            found.append(f"{path}:{imported.line}: {imported.module} enters by {door} only")
    return found


def python_files() -> dict[str, str]:
    """Text of every Python file of the project, by path."""
    files = (file for package in ARROWS for file in (ROOT / package).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def written_files() -> dict[str, str]:
    """Text of every file that somebody wrote: code, configs, launch specs, documents."""
    suffixes = {".py", ".sh", ".yaml", ".yml", ".toml", ".md", ".sbatch"}
    inside = (file for package in ARROWS for file in (ROOT / package).rglob("*"))
    files = [file for file in (*ROOT.iterdir(), *inside) if file.suffix in suffixes and file.is_file()]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in [*files, ROOT / ".ci/run"]}


def test_imports_follow_the_arrows_and_libraries_their_doors() -> None:
    found = [words for path, source in python_files().items() for words in violations(source, path)]
    assert not found, "\n".join(found)


def test_python_files_lie_in_the_packages_of_the_design() -> None:
    outside = [
        file.relative_to(ROOT).as_posix()
        for folder in ROOT.iterdir()
        if folder.is_dir() and folder.name not in {*ARROWS, "datasets", "runs", "build", "shared"}
        if not folder.name.startswith(".")
        for file in folder.rglob("*.py")
    ]
    assert not [*outside, *ROOT.glob("*.py")], "the layout has no other place for Python"


@pytest.mark.parametrize(
    ("path", "source", "words"),
    [
        ("models/a.py", "import trainer.loop", "models must not import trainer.loop"),
        ("models/a.py", "from data.shards import DataError", "models must not import data.shards"),
        ("data/a.py", "from models import shapes", "data must not import models"),
        ("trainer/a.py", "import cluster.preflight", "trainer must not import cluster.preflight"),
        ("trainer/a.py", "from tests.launch import ROOT", "trainer must not import tests.launch"),
        ("data/a.py", "def f():\n    import torch, trainer.step", "data/a.py:2: data must not import trainer.step"),
        (
            "data/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from models.shapes import Image",
            "data/a.py:3: data must not import models.shapes",
        ),
        ("data/a/b.py", "from ...models import shapes", "data must not import models"),
        ("data/a.py", "from .. import models", "data must not import models"),
        ("data/a.py", "import importlib\nimportlib.import_module('models.shapes')", "data must not import models"),
        ("data/a.py", "__import__('trainer')", "data must not import trainer"),
        ("trainer/worker.py", "import ray", "ray enters by"),
        ("trainer/loop.py", "def f():\n    from mlflow.entities import Run", "mlflow.entities enters by"),
        ("trainer/tracking_store.py", "import mlflow", "mlflow enters by"),
        ("trainer/losses.py", "from deepspeed import zero", "deepspeed enters by"),
        ("trainer/worker.py", "import webdataset as wds", "webdataset enters by"),
        ("cluster/other.py", "import ray", "ray enters by"),
        (
            "models/a.py",
            "if True:\n    try:\n        import deepspeed\n    except ImportError: ...",
            "deepspeed enters by",
        ),
    ],
)
def test_a_wrong_import_is_found(path: str, source: str, words: str) -> None:
    found = violations(source, path)
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cluster/preflight.py", "import ray\nfrom trainer.config import TrainConfig"),
        ("trainer/engines_zero.py", "import deepspeed"),
        ("trainer/a.py", "from models.shapes import Image\nfrom data.shards import DataError\nfrom .step import x"),
        ("trainer/a.py", "import rayon\nimport database\nimport modelsx"),
        ("trainer/a.py", '"""import ray"""\nimportlib.metadata.version("ray")  # import mlflow'),
        ("data/deep/a.py", "import webdataset\nfrom .. import shards\nfrom ..shards import DataError"),
        ("tests/trainer/test_a.py", "import ray, mlflow\nfrom trainer import step"),
    ],
)
def test_a_right_import_passes(path: str, source: str) -> None:
    assert violations(source, path) == []


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    code = undeclared(project["dependencies"], (path for path in python_files() if not path.startswith("tests/")))
    dev = undeclared([*project["dependencies"], *project["optional-dependencies"]["dev"]], python_files())
    assert not {**code, **dev}, "pyproject.toml does not name what these files import"


def undeclared(requirements: list[str], paths: Iterable[str]) -> dict[str, str]:
    """Third-party modules that no requirement brings, each with a file that imports it."""
    declared = {canonicalize_name(Requirement(requirement).name) for requirement in requirements}
    sources, providers = python_files(), packages_distributions()
    known = {*ARROWS, *sys.stdlib_module_names}
    found = ((imported.top, path) for path in paths for imported in imports_of(sources[path], path))
    return {
        module: path
        for module, path in found
        if module not in known and not declared & {canonicalize_name(name) for name in providers.get(module, [])}
    }


def test_no_file_is_longer_than_it_can_be_read() -> None:
    long = {path: lines for path, text in written_files().items() if (lines := text.count("\n")) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines: split by job"


def test_every_public_module_class_and_function_is_documented() -> None:
    """Methods are documented by their protocol where they have one, so the lint itself looks after them."""
    packages = [package for package in ARROWS if package != "tests"]
    ruff = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--ignore-noqa",
        "--no-cache",
        "--output-format=concise",
    ]
    done = subprocess.run([*ruff, "--select", "D100,D101,D103", *packages], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_left_unfinished() -> None:
    found = [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for path, text in written_files().items()
        for match in UNFINISHED.finditer(text)
    ]
    assert not found, "\n".join(found)


def test_an_unfinished_mark_is_found() -> None:
    for mark in ("# TO" + "DO: later", "raise NotImple" + "mentedError", "raise NotImple" + "mentedError(name)"):
        assert UNFINISHED.search(mark)
    assert not UNFINISHED.search("except NotImple" + "mentedError as error:")


def test_checks_see_the_project() -> None:
    assert {"trainer/run.py", "data/shards.py", "models/diffusion.py", "tests/launch.py"} <= python_files().keys()
    assert {"launch.sh", "pyproject.toml", "trainer/configs/digits.yaml", ".ci/run"} <= written_files().keys()
    assert Path(ROOT / "launch.sh").stat().st_mode & 0o111, "launch.sh must be executable"
    assert Path(ROOT / ".ci/run").stat().st_mode & 0o111, ".ci/run must be executable"
