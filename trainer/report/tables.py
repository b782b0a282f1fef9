"""The tables of the report, as text in cells: the page and Markdown show the same ones."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from trainer.report.hours import CATEGORIES, Hours
from trainer.report.interval import daly, share_lost, young
from trainer.report.runs import Run

NONE = "–"
_VERSION = "version."


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: its heading.
        header: of each column.
        rows: cells; the first of a row is its name.
        note: what a reader must know of the figures.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables_of(runs: Sequence[Run], usd_per_gpu_hour: float | None) -> list[Table]:
    """All tables that have rows, in the order of the report."""
    found = [
        _conditions(runs),
        _hours(runs),
        _totals(runs, usd_per_gpu_hour),
        _failures(runs),
        _intervals(runs),
        _figures(runs),
        _differences(runs),
        _data(runs),
    ]
    return [table for table in found if table.rows]


def duration(seconds: float) -> str:
    """A time in the unit that fits it: 41.3 s, 12.6 min, 83.15 h."""
    if abs(seconds) < 120:
        return f"{seconds:.3g} s" if abs(seconds) < 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if abs(seconds) < 7200 else f"{seconds / 3600:,.2f} h"


def moment(at: float) -> str:
    """A time in s since 1970, in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def number(value: float) -> str:
    """A figure in four digits."""
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e9 else f"{value:.4g}"


def _names(runs: Sequence[Run]) -> tuple[str, ...]:
    return ("", *(run.name for run in runs))


def _by_run(runs: Sequence[Run], rows: dict[str, Callable[[Run], str | None]]) -> tuple[tuple[str, ...], ...]:
    """Rows with a cell for each run; those that no run has are left out."""
    made = ((name, [of(run) for run in runs]) for name, of in rows.items())
    return tuple((name, *(cell or NONE for cell in cells)) for name, cells in made if any(cells))


def _of_hours(value: Callable[[Hours], str | None]) -> Callable[[Run], str | None]:
    return lambda run: value(run.hours) if run.hours else None


def _fact(name: str) -> Callable[[Run], str | None]:
    """A fact of the starts; several, if it changed."""

    def of(hours: Hours) -> str | None:
        return ", then ".join(dict.fromkeys(str(start.facts[name]) for start in hours.starts if name in start.facts))

    return _of_hours(of)


def _conditions(runs: Sequence[Run]) -> Table:
    rows: dict[str, Callable[[Run], str | None]] = {
        "state": lambda run: run.state,
        "first start": _of_hours(lambda hours: moment(hours.began)),
        "end": _of_hours(lambda hours: moment(hours.ended)),
        "starts": _of_hours(lambda hours: str(len(hours.starts))),
        "device": _fact("device"),
        "processor": _fact("processor"),
        "ranks": _fact("world_size"),
        "precision": _fact("precision"),
        "global batch": lambda run: str(run.config.get("training.global_batch_size", "")),
        "commit": lambda run: run.tags.get("git_commit", "")[:12],
        "uncommitted changes": lambda run: {"true": "yes", "false": "no"}.get(run.tags.get("git_dirty", "")),
    }
    libraries = dict.fromkeys(name for run in runs for name in run.tags if name.startswith(_VERSION))
    for library in sorted(libraries):
        rows[library.removeprefix(_VERSION)] = lambda run, library=library: run.tags.get(library)
    return Table("Runs and their conditions", _names(runs), _by_run(runs, rows))


def _hours(runs: Sequence[Run]) -> Table:
    def cell(key: str) -> Callable[[Hours], str]:
        return lambda hours: (
            f"{duration(hours.seconds[key])} ({hours.seconds[key] / hours.wall_s:.1%})" if hours.seconds[key] else NONE
        )

    rows = {words: _of_hours(cell(key)) for key, words in CATEGORIES.items()}
    rows["all, from the first start to the end"] = _of_hours(lambda hours: duration(hours.wall_s))
    return Table(
        "Where the hours went",
        _names(runs),
        _by_run(runs, rows),
        "As rank 0 spent them. Computing includes the wait for a GPU's results. A rank that waits for data may have "
        "work queued on its GPU. The first step of each start, in which code is compiled, belongs to the start. The "
        "end of a killed start is known to a thousandth of its time, at best to a second; the rest counts as what "
        "follows.",
    )


def _totals(runs: Sequence[Run], usd_per_gpu_hour: float | None) -> Table:
    def price(hours: Hours) -> str | None:
        if usd_per_gpu_hour is None or not hours.gpu_seconds:
            return None
        return f"{hours.gpu_seconds / 3600 * usd_per_gpu_hour:,.2f}"

    rows = {
        "goodput: computing that was kept, of the time in which ranks were held": _of_hours(
            lambda hours: f"{hours.goodput:.1%}"
        ),
        "the same, of all the time": _of_hours(
            lambda hours: f"{hours.seconds['computing'] / hours.wall_s:.1%}" if hours.wall_s else None
        ),
        "steps done again": _of_hours(lambda hours: f"{hours.lost_steps:,}"),
        "seconds of a step, with its data": _of_hours(lambda hours: duration(hours.step_s) if hours.steps else None),
        "rank-hours": _of_hours(lambda hours: number(hours.rank_seconds / 3600)),
        "GPU-hours": _of_hours(lambda hours: number(hours.gpu_seconds / 3600) if hours.gpu_seconds else None),
        f"USD, at {usd_per_gpu_hour or 0:,.2f} a GPU-hour": _of_hours(price),
    }
    note = "Rank-hours and GPU-hours are without pauses and without waiting for nodes."
    if usd_per_gpu_hour is not None and not any(run.hours and run.hours.gpu_seconds for run in runs):
        note += " No run had a GPU, so there is no price."
    return Table("Use of the machines", _names(runs), _by_run(runs, rows), note)


def _failures(runs: Sequence[Run]) -> Table:
    rows = [
        (run.name, moment(failure.at), f"{failure.step:,}", failure.reason)
        for run in runs
        for failure in (run.hours.failures if run.hours else ())
    ]
    return Table("Failures", ("run", "last sign of life", "after step", "reason"), tuple(rows))


def _intervals(runs: Sequence[Run]) -> Table:
    rows: dict[str, list[str]] = {}
    for run in runs:
        for name, cell in _interval(run):
            rows.setdefault(name, [NONE] * len(runs))[runs.index(run)] = cell
    return Table(
        "How often to save",
        _names(runs),
        tuple((name, *cells) for name, cells in rows.items()),
        "Young: W = √(2 C M). Daly: W = √(2 C M) (1 + √(C/2M)/3 + (C/2M)/9) − C. C is the time for which a save holds "
        "training up, M the time in which ranks were held for each failure. Lost share, in first order: C/W + W/2M. "
        "M of a few failures is rough; without one, none is given.",
    )


def _interval(run: Run) -> Iterator[tuple[str, str]]:
    hours, interval = run.hours, run.config.get("checkpoint.save_interval_steps")
    if hours is None or not hours.saves:
        return
    save_s, step_s = hours.save_s, hours.step_s
    yield "a save holds training up for (C)", duration(save_s)
    used = interval * step_s if isinstance(interval, int) else 0.0
    if used:
        yield "interval of the run", f"{interval:,} steps, {duration(used)}"
    yield "failures", str(len(hours.failures))
    if not hours.failures or not save_s:
        return
    between = hours.held_s / len(hours.failures)
    yield "time between failures (M)", duration(between)
    if used:
        yield "interval of the run: expected loss", f"{share_lost(used, save_s, between):.1%}"
    for name, best in (("Young", young(save_s, between)), ("Daly", daly(save_s, between))):
        steps = f"{max(1, round(best / step_s)):,} steps, " if step_s else ""
        yield f"best by {name}", f"{steps}{duration(best)}"
        yield f"best by {name}: expected loss", f"{share_lost(best, save_s, between):.1%}"


def _figures(runs: Sequence[Run]) -> Table:
    rows = []
    for curve in sorted({curve for run in runs for curve in run.curves}):
        for run in runs:
            points = run.curves.get(curve, ())
            if points:
                extremes = (min(points, key=lambda point: point[1]), max(points, key=lambda point: point[1]))
                cells = [f"{number(value)} at {step:,}" for step, value in (points[-1], *extremes)]
                rows.append((curve, run.name, *cells))
    note = "Each with its step. Curves are means over the steps since the point before."
    return Table("Figures", ("curve", "run", "last", "lowest", "highest"), tuple(rows), note)


def _differences(runs: Sequence[Run]) -> Table:
    keys = dict.fromkeys(key for run in runs for key in run.config)
    absent = "not there"
    rows = [(key, *(_setting(run.config.get(key, absent)) for run in runs)) for key in keys]
    return Table("Differences of the configs", _names(runs), tuple(row for row in rows if len(set(row[1:])) > 1))


def _setting(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _data(runs: Sequence[Run]) -> Table:
    names = dict.fromkeys(name for run in runs for name in run.data)
    rows = {name: lambda run, name=name: run.data.get(name) for name in names}
    return Table("Data", _names(runs), _by_run(runs, rows))
