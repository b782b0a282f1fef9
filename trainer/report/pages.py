"""The report as one HTML file, which needs no server and asks no other host for anything.

Every text of a run is escaped, and the page's own policy forbids the browser to load anything.
"""

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from trainer.report.chart import LEFT, RIGHT, WIDTH, appearance, draw, draw_hours
from trainer.report.curves import FOLDED, GROUPS, Chart, charts_of
from trainer.report.hours import CATEGORIES
from trainer.report.runs import Run
from trainer.report.tables import NONE, Table, duration, number, tables_of

_FOLDER = Path(__file__).parent / "page"
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
FIRST = ("Runs and their conditions", "Where the hours went", "Use of the machines")
"""Tables above the curves."""
MAX_ROWS = 12
"""Rows of the table below a chart."""


def page(runs: Sequence[Run], usd_per_gpu_hour: float | None) -> str:
    """The report as HTML; the same text for the same runs."""
    charts = charts_of([run.curves for run in runs])
    batches = [run.config.get("training.global_batch_size") for run in runs]
    by_images = len(set(batches)) > 1 and all(type(batch) is int for batch in batches)
    scales = [batch if by_images and isinstance(batch, int) else 1 for batch in batches]
    axis = "image" if by_images else "step"
    tables = {table.title: table for table in tables_of(runs, usd_per_gpu_hour)}
    title = "Report: " + ", ".join(run.name for run in runs)
    data = [
        {
            "lines": [[[step * scales[line.run], value] for step, value in line.points] for line in chart.lines],
            "left": LEFT,
            "right": RIGHT,
            "width": WIDTH,
            "axis": axis,
        }
        for chart in charts
    ]
    body = "\n".join(_body(runs, charts, scales, axis, tables))
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("style.css", "page.js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
<script id="curves" type="application/json">{_json(data)}</script>
<script>
{script}</script>
</body>
</html>
"""


def _json(value: object) -> str:
    """JSON that cannot end the script element that it is in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _body(
    runs: Sequence[Run], charts: Sequence[Chart], scales: Sequence[int], axis: str, tables: dict[str, Table]
) -> Iterator[str]:
    groups = [group for group in GROUPS if any(chart.group == group for chart in charts)]
    grids = "Samples over time" if any(run.grids for run in runs) else None
    first = [title for title in tables if title in FIRST]
    sections = [*first, *filter(None, [grids]), *groups, *(title for title in tables if title not in FIRST), "Configs"]
    links = (f'<a href="#s{i}">{escape(title)}</a>' for i, title in enumerate(sections))
    yield f"<nav>{''.join(links)}</nav>"
    for run in runs:
        for lack in run.missing:
            yield f'<p class="missing"><b>{escape(run.name)}</b>: {escape(lack)}</p>'
    for i, title in enumerate(sections):
        if title in groups:
            shown = [(j, chart) for j, chart in enumerate(charts) if chart.group == title]
            inner = "".join(_figure(j, chart, runs, scales, axis) for j, chart in shown)
            inner = f'<div class="charts">{inner}</div>'
            if title in FOLDED:
                summary = f'<summary class="group">{title} ({len(shown)} charts)</summary>'
                yield f'<details id="s{i}">{summary}{inner}</details>'
                continue
            if title == groups[0]:
                hint = "Point at a chart to read its values, or choose it with Tab and go with the arrow keys."
                inner = f'<p class="note hint">{hint}</p>{inner}'
        elif title == grids:
            inner = f'<div class="charts">{"".join(_samples(run) for run in runs if run.grids)}</div>'
        elif title == "Configs":
            inner = "".join(_config(run) for run in runs)
        else:
            inner = _hours(runs) if title == "Where the hours went" else ""
            inner += _table(tables[title])
            if title == "Figures":
                inner = f"<details><summary>{len(tables[title].rows)} rows</summary>{inner}</details>"
        yield f'<section><h2 id="s{i}">{escape(title)}</h2>{inner}</section>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = []
    for name, *cells in table.rows:
        inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{inner}</tr>')
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'


def _hours(runs: Sequence[Run]) -> str:
    bars, used = [], set[str]()
    for run in runs:
        if run.hours:
            used |= {key for key, seconds in run.hours.seconds.items() if seconds}
            heading = f"{escape(run.name)}: {duration(run.hours.wall_s)}"
            bars.append(f"<h3>{heading}</h3>{draw_hours(run.hours, run.name)}")
    keys = (f'<li><i class="h{i}"></i>{words}</li>' for i, (key, words) in enumerate(CATEGORIES.items()) if key in used)
    return f'{"".join(bars)}<ul class="keys">{"".join(keys)}</ul>'


def _figure(index: int, chart: Chart, runs: Sequence[Run], scales: Sequence[int], axis: str) -> str:
    items, names = [], []
    for line in chart.lines:
        colour, dash = appearance(line, chart, len(runs))
        words = [runs[line.run].name] if len(runs) > 1 else []
        names.append(" ".join(filter(None, [*words, line.part])) or chart.name)
        style = f' stroke-dasharray="{dash}"' if dash else ""
        swatch = f'<svg viewBox="0 0 30 10" aria-hidden="true"><path class="line {colour}" d="M0,5H30"{style}/></svg>'
        items.append(f"<li>{swatch}<span>{escape(names[-1])}</span><output></output></li>")
    values = [{step * scales[line.run]: value for step, value in line.points} for line in chart.lines]
    places = sorted({x for points in values for x in points})
    if len(places) > MAX_ROWS:
        places = [places[i * (len(places) - 1) // (MAX_ROWS - 1)] for i in range(MAX_ROWS)]
    rows = [
        (f"{x:,}", *(number(points[x]) if x in points else NONE for points in values)) for x in places
    ]  # what a reader without a pointer, a script or colours has
    table = _table(Table("", (axis, *names), tuple(rows)))
    label = escape(f"{chart.name} by {axis}; arrow keys read its values", quote=True)
    caption = f"<figcaption>{escape(chart.name)} <small>by {axis}</small></figcaption>"
    return (
        f'<figure>{caption}<div class="chart" tabindex="0" role="group" '
        f'aria-label="{label}" data-chart="{index}">{draw(chart, len(runs), scales)}'
        f'<div class="at" aria-live="polite"></div><ul class="legend" aria-live="polite">{"".join(items)}</ul></div>'
        f"<details><summary>as a table</summary>{table}</details></figure>"
    )


def _samples(run: Run) -> str:
    last = len(run.grids) - 1
    pictures = "".join(
        f'<img src="{grid.url}" data-step="{grid.step}" alt="samples of {escape(run.name, quote=True)} after step '
        f'{grid.step}"{"" if i == last else " hidden"}>'
        for i, grid in enumerate(run.grids)
    )
    shown = f", {len(run.grids)} of {run.num_grids} grids" if run.num_grids > len(run.grids) else ""
    label = escape(f"step of the samples of {run.name}", quote=True)
    slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{label}">'
    heading = f'{escape(run.name)}, <span class="step">step {run.grids[-1].step:,}</span>{shown}'
    return (
        f'<div class="samples"><h3>{heading}</h3>{slider if last else slider.replace(">", " hidden>")}{pictures}</div>'
    )


def _config(run: Run) -> str:
    return f"<details><summary>{escape(run.name)}: config.yaml</summary><pre>{escape(run.config_text)}</pre></details>"
