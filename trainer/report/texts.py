"""The report as Markdown, with its tables, and as JSON, with its numbers."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trainer.report.runs import Run
from trainer.report.tables import Table, tables_of

_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|#"})


def markdown(runs: Sequence[Run], usd_per_gpu_hour: float | None) -> str:
    """All tables; texts of a run are escaped."""
    parts = ["# Report: " + ", ".join(_cell(run.name) for run in runs)]
    lacks = [f"- **{_cell(run.name)}**: {_cell(lack)}" for run in runs for lack in run.missing]
    parts += ["\n".join(lacks)] if lacks else []
    parts += [_table(table) for table in tables_of(runs, usd_per_gpu_hour)]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    rows = [table.header, ("---",) * len(table.header), *table.rows]
    cells = (" | ".join(cell if cell == "---" else _cell(cell) for cell in row) for row in rows)
    note = f"\n\n{_cell(table.note)}" if table.note else ""
    return f"## {table.title}\n\n" + "\n".join(f"| {row} |" for row in cells) + note


def _cell(text: str) -> str:
    return " ".join(text.split()).translate(_SPECIAL)


def as_json(runs: Sequence[Run], usd_per_gpu_hour: float | None) -> str:
    """Numbers of each run: seconds, curves, config. Without the pictures."""
    return json.dumps([_facts(run, usd_per_gpu_hour) for run in runs], indent=1, ensure_ascii=False) + "\n"


def _facts(run: Run, usd_per_gpu_hour: float | None) -> dict[str, Any]:
    hours = run.hours
    account = None
    if hours:
        account = asdict(hours) | {
            "wall_s": hours.wall_s,
            "held_s": hours.held_s,
            "goodput": hours.goodput,
            "step_s": hours.step_s,
            "usd": None if usd_per_gpu_hour is None else hours.gpu_seconds / 3600 * usd_per_gpu_hour,
        }
    return {
        "name": run.name,
        "state": run.state,
        "missing": run.missing,
        "hours": account,
        "config": run.config,
        "tags": run.tags,
        "data": run.data,
        "curves": run.curves,
        "grids": [grid.step for grid in run.grids],
    }
