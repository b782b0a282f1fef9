"""Layout rules: direction of imports, which files import a library, and limits on folder and file sizes."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.import_graph import (
    ARROWS,
    FLOORS,
    circle,
    floor_of,
    folder_graph,
    folder_of,
    import_graph,
    imports_of,
    picture,
    python_files,
    targets,
)
from tests.launch import ROOT

DOORS = {
    "av": {"trainer/sample/video.py"},
    "deepspeed": {"trainer/engine/zero.py"},
    "diffusers": {f"trainer/export/portable/{name}.py" for name in ("ddgan_generator", "ddgan_scheduler", "pipeline")},
    "huggingface_hub": {"data/fetch/hub.py", "trainer/export/hub.py"},
    "mlflow": {"trainer/tracking/mlflow_sink.py"},
    "pynvml": {"trainer/tracking/system.py"},
    "ray": {
        *(f"trainer/driver/{name}.py" for name in ("connection", "controller", "ray_train")),
        *("cluster/preflight.py", "cluster/sweep/tuner.py", "data/prepare/on_ray.py"),
    },
    "onnxruntime": {"trainer/export/onnx_graphs.py"},
    "starlette": {"trainer/demo/server.py"},
    "tifffile": {"data/images/tiff.py"},
    "tensorboardX": {"trainer/tracking/tensorboard_sink.py"},
    "triton": {f"models/fused/kernels/{name}.py" for name in ("elementwise", "fir", "norm", "whole_norm")},
    "uvicorn": {"trainer/demo/server.py"},
    "wandb": {"trainer/tracking/wandb_sink.py"},
    "webdataset": {"data/stream/batches.py", "data/stream/pipeline.py", "data/bench.py"},
}
"""The files that may import a library; tests may as well."""
BROUGHT = {"triton"}
"""Libraries that torch's builds for GPUs bring, and that other machines do without."""
MAX_FILES = 13
"""Python files in one folder, without `__init__` and `__main__`."""
MAX_LINES = 400
LONG: dict[str, str] = {
    "trainer/export/portable/ddgan_generator.py": "diffusers loads a model from one file, without the project",
}
"""Files that may be longer, each with the reason why it cannot be split."""
# Assembled from halves, so that this file does not match.
UNFINISHED = re.compile(rf"\b(TO{'DO'}|FIX{'ME'}|XX{'X'}|HA{'CK'}|raise NotImple{'mented'}(?:Error)?)\b")


def violations(source: str, path: str, paths: Iterable[str] = ()) -> list[str]:
    """The imports of a file that break the package, floor or library rules, each as `path:line: words`.

    Args:
        source: text of the file.
        path: path of the file, from the root.
        paths: all Python files of the project, for the floors.
    """
    package, folder, found = path.split("/")[0], folder_of(path), []
    for imported in imports_of(source, path):
        where = f"{path}:{imported.line}"
        if imported.top in ARROWS and imported.top not in {package, *ARROWS[package]}:
            found.append(f"{where}: {package} must not import {imported.module}")
            continue
        for target in sorted(targets(imported, paths)):
            other = folder_of(target)
            if other != folder and floor_of(other) >= floor_of(folder):
                found.append(f"{where}: {folder} must not import {target}, which is on floor {floor_of(other)}")
        doors = DOORS.get(imported.top)
        if doors and package != "tests" and path not in doors:
            found.append(f"{where}: {imported.module} enters by {' and '.join(sorted(doors))} only")
    return found


def listed_in(docstring: str) -> list[str]:
    """The names that a folder's docstring lists, one per line: `    name  what it is`."""
    return re.findall(r"(?m)^    ([\w.]+/?)  +\S", docstring)


def written_files() -> dict[str, str]:
    """Text of every hand-written file: code, configs, launch specs, documents."""
    suffixes = {".py", ".sh", ".yaml", ".yml", ".toml", ".md", ".sbatch"}
    inside = (file for package in ARROWS for file in (ROOT / package).rglob("*"))
    files = [file for file in (*ROOT.iterdir(), *inside) if file.suffix in suffixes and file.is_file()]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in [*files, ROOT / ".ci/run"]}


@pytest.mark.slow
def test_imports_follow_the_arrows_and_floors_and_libraries_their_doors() -> None:
    files = python_files()
    found = [words for path, source in files.items() for words in violations(source, path, files)]
    assert not found, "\n".join(found)


def test_no_file_and_no_folder_imports_in_a_circle() -> None:
    files = {path: source for path, source in python_files().items() if not path.startswith("tests/")}
    graph = import_graph(files)
    assert not circle(graph)
    assert not circle(folder_graph(files))


def test_picture_of_the_imports_is_that_of_the_source() -> None:
    drawn = (ROOT / "docs/images/imports.svg").read_text()
    assert drawn == picture(python_files()), "python -m tests.import_graph >docs/images/imports.svg"


@pytest.mark.slow
def test_benchmarks_run_where_ray_is_not_installed() -> None:
    """A machine that is there for minutes has only what a rank needs."""
    graph, files = import_graph(python_files()), python_files()
    reached, new = set[str](), {path for path in files if path.startswith(("trainer/bench/", "trainer/tune/"))}
    new |= {"trainer/worker.py", "trainer/evaluate/command.py"}
    while new:
        reached |= new
        new = set().union(*(graph[path] for path in new)) - reached - {"data/prepare/on_ray.py"}  # only with --ray
    found = [path for path in reached for imported in imports_of(files[path], path) if imported.top == "ray"]
    assert found == []


def test_every_folder_is_on_one_floor() -> None:
    folders = {folder_of(path) for path in python_files()}
    assert sorted(folder for floor in FLOORS for folder in floor) == sorted(folders)


def test_no_folder_is_fuller_than_it_can_be_surveyed() -> None:
    held: dict[str, int] = {}
    for path in python_files():
        folder, _, name = path.rpartition("/")
        held[folder] = held.get(folder, 0) + (name not in {"__init__.py", "__main__.py"})
    full = {folder: number for folder, number in held.items() if number > MAX_FILES}
    assert not full, f"more than {MAX_FILES} files: split by part"


def test_docstring_of_each_folder_lists_what_lies_in_it() -> None:
    wrong = {}
    for file in (file for package in ARROWS if package != "tests" for file in (ROOT / package).rglob("__init__.py")):
        entries = [entry for entry in file.parent.iterdir() if not entry.name.startswith(("_", "."))]
        there = {f"{entry.name}/" if entry.is_dir() else entry.name.removesuffix(".py") for entry in entries}
        listed = listed_in(ast.get_docstring(ast.parse(file.read_text()), clean=False) or "")
        if listed != sorted(there, key=lambda name: name.removesuffix("/")):
            wrong[str(file.relative_to(ROOT))] = there.symmetric_difference(listed) or "not in alphabetical order"
    assert not wrong


def test_tests_lie_in_the_folders_of_what_they_test() -> None:
    code = {path.rpartition("/")[0] for path in python_files() if not path.startswith("tests/")}
    rooms = {
        path.rpartition("/")[0].removeprefix("tests/") for path in python_files() if re.search(r"/test_\w+$", path[:-3])
    }
    assert rooms - {"tests", "integration", "trainer/fuzz"} <= code  # these test several folders together


def imported_tests(source: str, path: str, paths: Iterable[str]) -> list[str]:
    """The imports of a file that read another test module, each as `path:line: file`."""
    return [
        f"{path}:{imported.line}: {target}"
        for imported in imports_of(source, path)
        for target in sorted(targets(imported, paths))
        if re.fullmatch(r"tests/(.+/)?test_\w+\.py", target)
    ]


def test_no_test_imports_from_a_test() -> None:
    files = python_files()
    found = [words for path, source in files.items() for words in imported_tests(source, path, files)]
    assert not found, "helpers of several tests have a file of their own:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "from tests.trainer.rank.test_worker import state_of",
        "from tests.trainer.rank import test_worker",
        "from tests.trainer.rank import runs, test_worker as others",
        "from ..rank import test_worker",
        "from . import test_run",
        "import tests.test_launch",
        "def f():\n    import importlib\n    importlib.import_module('tests.test_launch')",
    ],
)
def test_an_import_from_a_test_is_found(source: str) -> None:
    modules = ("tests/trainer/rank/test_worker.py", "tests/trainer/driver/test_run.py", "tests/test_launch.py")
    assert len(imported_tests(source, "tests/trainer/driver/a.py", [*modules, "tests/trainer/rank/runs.py"])) == 1


def test_an_import_of_a_helper_or_of_a_name_that_begins_like_a_test_passes() -> None:
    paths = ("tests/trainer/rank/runs.py", "tests/trainer/rank/test_worker.py", "tests/trainer/__init__.py")
    source = "from tests.trainer.rank import runs\nfrom tests.trainer.rank.runs import test_config"
    assert imported_tests(source, "tests/trainer/driver/test_a.py", paths) == []


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
        ("trainer/run.py", "import ray", "ray enters by"),
        ("trainer/loop.py", "def f():\n    from mlflow.entities import Run", "mlflow.entities enters by"),
        ("trainer/tracking/store.py", "import mlflow", "mlflow enters by"),
        ("trainer/algorithm/losses.py", "from deepspeed import zero", "deepspeed enters by"),
        ("data/sources/tars.py", "import webdataset", "webdataset enters by"),
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
        ("cluster/preflight.py", "import ray\nfrom trainer.config.io import load_config"),
        ("trainer/engine/zero.py", "import deepspeed"),
        ("trainer/a.py", "from models.shapes import Image\nfrom data.shards import DataError\nfrom .step import x"),
        ("trainer/a.py", "import rayon\nimport database\nimport modelsx"),
        ("trainer/a.py", '"""import ray"""\nimportlib.metadata.version("ray")  # import mlflow'),
        ("data/stream/batches.py", "import webdataset\nfrom .. import shards\nfrom ..shards.index import ShardIndex"),
        ("tests/trainer/test_a.py", "import ray, mlflow\nfrom trainer import step"),
    ],
)
def test_a_right_import_passes(path: str, source: str) -> None:
    assert violations(source, path) == []


HOUSE = ("models/shapes.py", "data/shards/__init__.py", "data/shards/index.py", "data/shards/cache.py")
HOUSE += ("trainer/engine/zero.py", "trainer/algorithm/adversarial.py", "trainer/config/io.py", "trainer/run.py")


@pytest.mark.parametrize(
    ("path", "source", "words"),
    [
        (
            "trainer/engine/a.py",
            "from trainer.algorithm.adversarial import Adversarial",
            "must not import trainer/algorithm/adversarial.py",
        ),
        ("trainer/engine/a.py", "def f():\n    from trainer.config import io", "a.py:2: trainer/engine must not"),
        ("trainer/algorithm/a.py", "import trainer.run", "must not import trainer/run.py"),
        ("data/storage/a.py", "from ..shards import index", "must not import data/shards/index.py"),
        ("data/storage/a.py", "from data import shards", "must not import data/shards/__init__.py"),
        (
            "data/sources/a.py",
            "from data.shards.index import Shard",
            "data/sources must not import data/shards/index.py",
        ),
    ],
)
def test_an_import_up_the_floors_is_found(path: str, source: str, words: str) -> None:
    found = violations(source, path, HOUSE)
    assert len(found) == 1
    assert words in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trainer/engine/a.py", "from trainer.engine.zero import make_engine\nfrom models.shapes import Image"),
        ("trainer/run.py", "from trainer.config import io\nfrom data.shards import index"),
        ("data/shards/reader.py", "from data.shards.cache import Cache"),
    ],
)
def test_an_import_down_the_floors_passes(path: str, source: str) -> None:
    assert violations(source, path, HOUSE) == []


def test_a_circle_is_found_through_lazy_and_typing_imports() -> None:
    files = {
        "data/a.py": "from data import b",
        "data/b.py": "def f():\n    from data.c import C",
        "data/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from data.a import A",
        "data/d.py": "import data.a",
    }
    assert set(circle(import_graph(files))) == {"data/a.py", "data/b.py", "data/c.py"}
    del files["data/c.py"]
    assert circle(import_graph(files)) == []


@pytest.mark.slow
def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, extras = project["dependencies"], project["optional-dependencies"]
    paths = [path for path in python_files() if not path.startswith("tests/")]
    # What has an extra.
    parts = {
        "data/fetch/hub.py": "hub",
        "data/images/tiff.py": "tiff",
        "trainer/export/": "export",
        "trainer/demo/": "demo",
        "trainer/sample/video.py": "video",
        "trainer/tracking/wandb_sink.py": "wandb",
    }
    code = undeclared(needed, (path for path in paths if not path.startswith(tuple(parts))))
    for part, extra in parts.items():
        code |= undeclared([*needed, *extras[extra]], (path for path in paths if path.startswith(part)))
    dev = undeclared([*needed, *extras["dev"]], python_files())
    assert not {**code, **dev}, "pyproject.toml does not name what these files import"


def undeclared(requirements: list[str], paths: Iterable[str]) -> dict[str, str]:
    """Third-party modules that no requirement provides, each with a file that imports it."""
    declared = {canonicalize_name(Requirement(requirement).name) for requirement in requirements}
    sources, providers = python_files(), packages_distributions()
    known = {*ARROWS, *sys.stdlib_module_names, *BROUGHT}
    found = ((imported.top, path) for path in paths for imported in imports_of(sources[path], path))
    return {
        module: path
        for module, path in found
        if module not in known and not declared & {canonicalize_name(name) for name in providers.get(module, [])}
    }


def test_no_file_is_longer_than_it_can_be_read() -> None:
    long = {path: lines for path, text in written_files().items() if (lines := text.count("\n")) > MAX_LINES}
    assert long.keys() == LONG.keys(), f"more than {MAX_LINES} lines: one thing, with its reason in LONG, or several?"


def test_every_public_module_class_and_function_is_documented() -> None:
    """Not methods: a method may be documented by its protocol, which the lint settings take into account."""
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
    assert {"trainer/run.py", "data/shards/index.py", "models/diffusion.py", "tests/launch.py"} <= python_files().keys()
    assert {"launch.sh", "pyproject.toml", "trainer/configs/digits.yaml", ".ci/run"} <= written_files().keys()
    assert Path(ROOT / "launch.sh").stat().st_mode & 0o111, "launch.sh must be executable"
    assert Path(ROOT / ".ci/run").stat().st_mode & 0o111, ".ci/run must be executable"
