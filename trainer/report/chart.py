"""A chart as SVG, which needs no script: the page's script adds the values under the pointer."""

import math
from collections.abc import Sequence
from html import escape

from trainer.report.curves import Chart, Line
from trainer.report.hours import CATEGORIES, Hours

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 10, 10, 30
"""Margins of the plot, in the units of the SVG."""
COLOURS = 8
"""Colours of lines, c0 to c7 in the page's style."""
_DASHES = ("", "6 3", "2 3", "8 3 2 3")


def nice_ticks(low: float, high: float, number: int = 4) -> list[float]:
    """About so many round values between two, low < high."""
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, math.floor(high / step + 1e-9) + 1)]


def extent(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest value, apart from each other."""
    low, high = min(values), max(values)
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    pad = abs(low) / 10 or 1.0
    return low - pad, high + pad


def appearance(line: Line, chart: Chart, num_runs: int) -> tuple[str, str]:
    """Class of the colour and dashes: with one run a colour for each part, with several a colour for each run."""
    parts = list(dict.fromkeys(line.part for line in chart.lines))
    part = parts.index(line.part)
    colour, dash = (part, line.run) if num_runs == 1 else (line.run, part)
    return f"c{colour % COLOURS}", _DASHES[dash % len(_DASHES)]


def draw(chart: Chart, num_runs: int, scales: Sequence[int]) -> str:
    """The chart as an SVG element.

    Args:
        chart: with at least one point in each line.
        num_runs: runs of the report.
        scales: of each run, what a step counts on the x axis: 1, or its images.
    """
    x0, x1 = extent([step * scales[line.run] for line in chart.lines for step, _ in line.points])
    y0, y1 = extent([value for line in chart.lines for _, value in line.points])
    margin = (y1 - y0) * 0.04
    y0, y1 = y0 - margin, y1 + margin

    def place(x: float, y: float) -> str:
        across = LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = []
    for tick in nice_ticks(y0, y1):
        y = place(x0, tick).split(",")[1]
        parts.append(f'<path class="grid" d="M{LEFT},{y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y}" dy="4" text-anchor="end">{_short(tick)}</text>')
    for tick in nice_ticks(x0, x1):
        x = place(tick, y0).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - 10}" text-anchor="middle">{_short(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    for line in chart.lines:
        colour, dash = appearance(line, chart, num_runs)
        points = [place(step * scales[line.run], value) for step, value in line.points]
        style = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<polyline class="line {colour}" points="{" ".join(points)}"{style}/>')
        if len(points) == 1:
            x, y = points[0].split(",")
            parts.append(f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="3"/>')
    parts.append(f'<path class="cursor" d="M0,{TOP}V{HEIGHT - BOTTOM}" visibility="hidden"/>')
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" data-x0="{x0!r}" data-x1="{x1!r}"'
    return f'<svg {box} role="img" aria-label="{escape(chart.name)}">{"".join(parts)}</svg>'


def draw_hours(hours: Hours, name: str) -> str:
    """A bar with a part for each category of a run's time."""
    if not hours.wall_s:
        return ""
    parts, x = [], 0.0
    for number, (key, words) in enumerate(CATEGORIES.items()):
        width = hours.seconds[key] / hours.wall_s * 1000
        if width > 0:
            title = f"{words}: {hours.seconds[key] / hours.wall_s:.1%}"
            place = f'x="{x:.2f}" y="0" width="{width:.2f}" height="34"'
            parts.append(f'<rect class="h{number}" {place}><title>{title}</title></rect>')
        x += width
    label = escape(f"Where the hours of {name} went", quote=True)
    box = 'class="bar" viewBox="0 0 1000 34" preserveAspectRatio="none"'
    return f'<svg {box} role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:.6g}"
