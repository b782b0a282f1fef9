"""The project's import graph: read from the source, and drawn as docs/images/imports.svg.

python -m tests.import_graph >docs/images/imports.svg
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from html import escape

from tests.launch import ROOT

ARROWS = {
    "models": set[str](),
    "data": set[str](),
    "trainer": {"models", "data"},
    "cluster": {"trainer", "models", "data"},
    "tests": {"cluster", "trainer", "models", "data"},
}
"""Our other packages that each package may import."""
FLOORS = (
    {"models/fused/kernels"},
    {"models/fused"},
    {"models", "data/storage", "data/images", "data/formats", "trainer/export/portable"},
    {"data/fetch", "models/networks"},
    {"models/published", "trainer/engine", "data/shards", "data/sources", "data/processes"},
    {"data/sets"},
    {"trainer/algorithm", "data/stream", "data/prepare"},
    {"trainer/config", "data"},
    {"trainer/checkpoint", "trainer/tracking", "trainer/plan", "trainer/timing", "trainer/rank/step"},
    {"trainer/sample", "trainer/evaluate/networks", "trainer/report"},
    {"trainer/evaluate", "trainer/demo"},
    {"trainer/rank", "trainer/export"},
    {"trainer/driver", "trainer/bench/steps"},
    {"trainer/bench"},
    {"trainer/tune"},
    {"trainer"},
    {"cluster"},
    {"tests"},
)
"""Every folder with Python files, lowest first: a folder imports folders on floors below its own. `trainer` and `data`
mean the files directly in them, the commands; `cluster` and `tests` include their subfolders."""


@dataclass(frozen=True)
class Imported:
    """One module that a file imports, anywhere in the file.

    Attributes:
        line: line of the statement.
        module: dotted name.
        names: names imported from it; some may be modules as well.
    """

    line: int
    module: str
    names: tuple[str, ...] = ()

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def imports_of(source: str, path: str) -> Iterator[Imported]:
    """Every import, including those in functions, under TYPE_CHECKING, relative, and by name through importlib."""
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            yield from (Imported(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = tuple(alias.name for alias in node.names)
            if node.module:
                yield Imported(node.lineno, ".".join([*base, node.module]), names)
            else:
                yield from (Imported(node.lineno, ".".join([*base, name])) for name in names)
        elif isinstance(node, ast.Call):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                    args=[ast.Constant(value=str(module)), *_],
                ):
                    yield Imported(node.lineno, module)


def folder_of(path: str) -> str:
    """The name in `FLOORS` of the folder that contains a file."""
    parts = path.split("/")[:-1]
    return parts[0] if parts[0] in {"cluster", "tests"} else "/".join(parts)


def floor_of(folder: str) -> int:
    """Number of a folder's floor; ValueError if it has none."""
    (floor,) = [number for number, folders in enumerate(FLOORS) if folder in folders]
    return floor


def targets(imported: Imported, paths: Iterable[str]) -> set[str]:
    """The project's files that an import reads."""
    base = imported.module.replace(".", "/")
    candidates = [f"{base}/{name}" for name in imported.names] or [base]
    found = {file for c in candidates for file in (f"{c}.py", f"{c}/__init__.py") if file in paths}
    if len(found) < len(candidates):  # at least one name is not a module
        found |= {file for file in (f"{base}.py", f"{base}/__init__.py") if file in paths}
    return found


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The nodes of one cycle in an import graph, if any."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def import_graph(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Our files that each file imports."""
    return {
        path: {target for imported in imports_of(source, path) for target in targets(imported, files)} - {path}
        for path, source in files.items()
    }


def python_files() -> dict[str, str]:
    """Text of every Python file of the project, by path."""
    files = (file for package in ARROWS for file in (ROOT / package).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def folder_graph(files: Mapping[str, str]) -> dict[str, set[str]]:
    """The folders that each folder's files import."""
    folders: dict[str, set[str]] = {}
    for path, others in import_graph(files).items():
        folders.setdefault(folder_of(path), set()).update(folder_of(other) for other in others)
    return {folder: others - {folder} for folder, others in folders.items()}


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Transitive reduction of an acyclic graph."""

    def reached(node: str) -> set[str]:
        return graph[node].union(*map(reached, graph[node]))

    return {
        node: {other for other in others if not any(other in reached(via) for via in others - {other})}
        for node, others in graph.items()
    }


COLUMNS = {
    **dict.fromkeys(("models", "models/fused", "models/fused/kernels", "models/published"), 0),
    **dict.fromkeys(("trainer/demo", "trainer/rank/step"), 0),
    **dict.fromkeys(("cluster", "trainer", "trainer/driver", "trainer/rank", "trainer/evaluate", "trainer/sample"), 1),
    **dict.fromkeys(("trainer/checkpoint", "trainer/config", "trainer/algorithm", "trainer/engine"), 1),
    **dict.fromkeys(("trainer/tune", "trainer/bench", "trainer/bench/steps", "trainer/tracking", "trainer/export"), 2),
    **dict.fromkeys(("trainer/export/portable", "trainer/evaluate/networks"), 2),
    "trainer/plan": 3,
    "models/networks": 2,
    **dict.fromkeys(("data", "data/stream", "data/shards", "data/storage"), 3),
    **dict.fromkeys(("data/images", "data/processes", "data/sets", "trainer/report", "trainer/timing"), 4),
    **dict.fromkeys(("data/prepare", "data/sources", "data/fetch", "data/formats"), 5),
}
"""The position of each folder in its row of the picture, left to right; the row is its floor."""
COLOURS = {"models": "#e3f1e1", "data": "#e1ecf7", "trainer": "#fdf0d9", "cluster": "#f0e6f5"}
WIDTH, HEIGHT = 164, 54
"""Size of a box, in pixels."""
GAP, ROW_GAP, MARGIN = 14, 30, 20
"""Space between boxes in a row, between rows, and around the picture, in pixels."""
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" text-anchor="middle">
<title>Imports between the folders; an arrow that a longer path implies is left out</title>
<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>
<rect width="100%" height="100%" fill="white"/>
"""
BOX = """\
<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{colour}" stroke="#888"/>
<text x="{middle}" y="{line}" font-size="13" font-weight="bold">{name}</text>
"""


def picture(files: Mapping[str, str]) -> str:
    """The folders as boxes, one row per floor, with an arrow from each to the folders it imports, as SVG."""
    graph = reduced({folder: others for folder, others in folder_graph(files).items() if folder != "tests"})
    top = max(map(floor_of, graph))
    corners = {
        folder: (MARGIN + COLUMNS[folder] * (WIDTH + GAP), MARGIN + (top - floor_of(folder)) * (HEIGHT + ROW_GAP))
        for folder in graph
    }
    width = max(x for x, _ in corners.values()) + WIDTH + MARGIN
    height = max(y for _, y in corners.values()) + HEIGHT + MARGIN
    arrows = [
        _arrow(corners[folder], corners[other], sorted(corners[f] for f in graph if other in graph[f]))
        for folder in sorted(graph)
        for other in sorted(graph[folder])
    ]
    boxes = [_box(folder, *corner) for folder, corner in sorted(corners.items())]
    return "".join([HEAD.format(width=width, height=height), *arrows, *boxes, "</svg>\n"])


def _arrow(start: tuple[int, int], end: tuple[int, int], sources: Sequence[tuple[int, int]]) -> str:
    """An arrow between two boxes, given by upper left corners; `sources` are all boxes with an arrow to `end`."""
    to_x = end[0] + WIDTH * (sources.index(start) + 1) // (len(sources) + 1)
    if end[1] - start[1] > HEIGHT + ROW_GAP and start[0] != end[0]:  # skips a row: sideways, then down its column
        from_x, from_y = start[0] + (WIDTH if end[0] > start[0] else 0), start[1] + HEIGHT // 2
        bends = f"{to_x} {from_y} {to_x} {from_y}"
    else:
        from_x, from_y = min(max(to_x, start[0] + WIDTH // 5), start[0] + WIDTH * 4 // 5), start[1] + HEIGHT
        bends = f"{from_x} {from_y + ROW_GAP} {to_x} {end[1] - ROW_GAP}"
    return f'<path d="M{from_x} {from_y}C{bends} {to_x} {end[1]}" fill="none" stroke="#555" marker-end="url(#head)"/>\n'


def _box(folder: str, x: int, y: int) -> str:
    name, purpose = folder, ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
    if folder in ("trainer", "data"):  # the files directly in them
        name, purpose = f"{folder}/*.py", "The commands."
    middle = x + WIDTH // 2
    box = BOX.format(
        x=x,
        y=y,
        width=WIDTH,
        height=HEIGHT,
        colour=COLOURS[folder.split("/")[0]],
        middle=middle,
        line=y + 18,
        name=name,
    )
    lines = textwrap.wrap(re.split(r"\.\s", purpose + " ")[0], 28, max_lines=2, placeholder=" ...")
    return box + "".join(
        f'<text x="{middle}" y="{y + 33 + 13 * number}" font-size="10.5">{escape(line)}</text>\n'
        for number, line in enumerate(lines)
    )


if __name__ == "__main__":
    sys.stdout.write(picture(python_files()))
