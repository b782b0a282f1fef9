"""The results of `trainer.bench gpu`: one JSON line each, and all of them as Markdown tables; written at once."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.storage.files import replaced

BASELINE = "authors' update"
"""Name of the row that the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measurement.

    Attributes:
        part: tests, steps, sampling, kernels or training.
        config: its name; empty for the tests.
        what: the row of the part.
        command: what was run.
        device: hardware and version of torch.
        date: day of the measurement.
        seconds: duration of the process.
        report: what it measured; empty if it failed.
        failure: why it failed, or was not reached.
        final: whether it need not be tried again.
    """

    part: str
    config: str
    what: str
    command: str
    device: str
    date: str
    seconds: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    final: bool = True


class Results:
    """The results in a folder, those of an earlier start included.

    Args:
        folder: gets results.jsonl and results.md.
    """

    def __init__(self, folder: Path) -> None:
        self._lines, self._page = folder / "results.jsonl", folder / "results.md"
        self.all: list[Result] = []
        if self._lines.exists():
            for line in self._lines.read_text(encoding="utf-8").splitlines():
                try:
                    self._put(Result(**json.loads(line)))
                except (ValueError, TypeError):  # the line that was being written when the machine was taken away
                    continue

    def done(self, command: str, device: str) -> Result | None:
        """The final result of this command on this device, if there is one."""
        return next((r for r in self.all if r.final and r.command == command and r.device == device), None)

    def add(self, result: Result) -> None:
        """Write a result."""
        self._put(result)
        with self._lines.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(result)) + "\n")
        with replaced(self._page) as draft:
            draft.write_text(as_markdown(self.all), encoding="utf-8")

    def _put(self, result: Result) -> None:
        """A result replaces an earlier one of the same command, which was not final."""
        self.all = [r for r in self.all if (r.command, r.device) != (result.command, result.device)]
        self.all.append(result)

    def of(self, part: str, config: str) -> list[Result]:
        """The results of one part that did not fail."""
        return [r for r in self.all if (r.part, r.config) == (part, config) and r.report]


def line_of(result: Result) -> str:
    """A result as one line for a terminal."""
    named = " ".join(filter(None, (result.part, result.config, result.what)))
    return f"{named}: {result.failure or ', '.join(_figures(result))}"


SHOWN = ("images_per_s", "mfu", "peak_memory_gib", "first_step_s", "batch")


def _figures(result: Result) -> Iterable[str]:
    """The figures of a result in words; of the steps only the most important."""
    for name, value in result.report.items():
        if result.part == "steps" and name not in SHOWN:
            continue
        if result.part == "kernels" and name != "device_s_per_step":
            yield f"{value:.1%} {name}"
        else:
            yield f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def as_markdown(results: Sequence[Result]) -> str:
    """All results as a page with a table for each part and config."""
    pages = [f"# Measured on {', '.join(sorted({r.device for r in results}))}\n"]
    for part, config in dict.fromkeys((r.part, r.config) for r in results):
        rows = [r for r in results if (r.part, r.config) == (part, config)]
        title = f"## {part.capitalize()}{f' of {config}' if config else ''}, {rows[-1].date}\n"
        pages += [title, _steps_table(rows) if part == "steps" else _plain_table(rows)]
    commands = [f"    {command}" for command in dict.fromkeys(r.command for r in results)]
    return "\n".join([*pages, "## Commands\n", *commands]) + "\n"


def _steps_table(rows: Sequence[Result]) -> str:
    base = next((r.report["images_per_s"] for r in rows if r.what.startswith(BASELINE) and r.report), None)
    lines = [
        "| what | images/s | times the baseline | MFU | GB | seconds to the first step |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        report = r.report
        if not report:
            lines.append(f"| {r.what} | {r.failure} | | | | |")
            continue
        times = f"{report['images_per_s'] / base:.2f}" if base else ""
        cells = [
            r.what,
            f"{report['images_per_s']:,.4g}",
            times,
            f"{report['mfu']:.1%}" if "mfu" in report else "",
            f"{report['peak_memory_gib']:.2f}" if "peak_memory_gib" in report else "",
            f"{report['first_step_s']:.1f}" if "first_step_s" in report else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plain_table(rows: Sequence[Result]) -> str:
    lines = ["| what | result |", "|---|---|"]
    for r in rows:
        figures = r.failure or ("<br>" if r.part == "kernels" else ", ").join(_figures(r))
        lines.append(f"| {r.what} | {figures.replace('|', '/')} |")
    return "\n".join(lines) + "\n"
