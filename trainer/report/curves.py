"""Curves of several runs, put into charts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.config.sections import FIGURES

Points = Sequence[tuple[int, float]]
PER_TIMESTEP = "Logits and errors per timestep"
GROUPS = ("Losses", PER_TIMESTEP, "Quality", "Time", "Other curves", "Machines")
FOLDED = frozenset({"Other curves", "Machines"})
"""Groups that are shown on request."""
MAX_BUCKETS = 400
"""A line has at most two points in each of so many equal parts of its steps: the lowest and the highest."""
_OF_TIMESTEP = re.compile(r"(.+)/(t\d+)")


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        run: number of its run, from 0.
        part: what it is within the chart, such as t0; may be empty.
        points: step and value, by step.
    """

    run: int
    part: str
    points: Points


@dataclass(frozen=True)
class Chart:
    """Lines that share axes."""

    group: str
    name: str
    lines: tuple[Line, ...]


def charts_of(runs: Sequence[Mapping[str, Points]]) -> list[Chart]:
    """The charts of all curves of the runs, in the order of their groups and names.

    Args:
        runs: the curves of each, with finite values and at least one point.
    """
    found: dict[tuple[str, str], list[Line]] = {}
    for number, curves in enumerate(runs):
        for curve, points in sorted(curves.items()):
            group, name, part = place_of(curve)
            if group == PER_TIMESTEP and len(runs) > 1:  # the lines of all runs would hide one another
                name, part = curve, ""
            found.setdefault((group, name), []).append(Line(number, part, thinned(points)))
    ordered = sorted(found.items(), key=lambda item: (GROUPS.index(item[0][0]), item[0][1]))
    return [Chart(group, name, tuple(lines)) for (group, name), lines in ordered]


def place_of(curve: str) -> tuple[str, str, str]:
    """Group, chart and part of a curve, from its name."""
    if match := _OF_TIMESTEP.fullmatch(curve):
        return PER_TIMESTEP, match[1], match[2]
    if curve.startswith("system/"):
        where, _, what = curve.removeprefix("system/").rpartition("/")
        return "Machines", what, where
    if curve.startswith("time/"):
        return "Time", "seconds of a step", curve.removeprefix("time/").removesuffix("_s")
    if curve in FIGURES:
        return "Quality", curve, ""
    if curve.startswith("loss_d_"):
        return "Losses", "loss_d", curve.removeprefix("loss_d_")
    if curve.startswith("loss_") or curve in ("r1", "r2"):
        return "Losses", curve, ""
    return ("Time" if curve in ("images_per_s", "step_time_s") else "Other curves"), curve, ""


def thinned(points: Points) -> Points:
    """The points, or so many of them that a drawing cannot show more: no extreme is left out."""
    if len(points) <= 2 * MAX_BUCKETS:
        return points
    first, last = points[0][0], points[-1][0]
    buckets: dict[int, list[tuple[int, float]]] = {}
    for step, value in points:
        buckets.setdefault((step - first) * MAX_BUCKETS // (last - first + 1), []).append((step, value))
    kept: set[tuple[int, float]] = {points[0], points[-1]}
    for held in buckets.values():
        kept |= {min(held, key=lambda point: point[1]), max(held, key=lambda point: point[1])}
    return sorted(kept)
