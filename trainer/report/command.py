"""Report on runs in one file: `python -m trainer.report RUN [RUN ...] --out report.html`.

It reads the runs' directories alone: no server, no network, no GPU. A run may still be running. The same command on
finished runs gives the same file. Exit codes: 0, written; 2, the command or a run is wrong.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.filesize import decimal

from data.storage.errors import OperationError, as_command
from data.storage.files import replaced
from data.storage.paths import path_argument
from trainer.config.command_line import add_price_argument
from trainer.report.pages import page
from trainer.report.runs import ReportError, Run, read_runs
from trainer.report.texts import as_json, markdown

FORMATS = {"html": page, "md": markdown, "json": as_json}


@as_command(failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=path_argument, nargs="+", metavar="RUN", help="directory of a run")
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--format", choices=list(FORMATS), default="html", help="a page (default), its tables, or its numbers"
    )
    add_price_argument(parser, "state what the GPU-hours cost")
    options = parser.parse_args(arguments)
    out = options.out
    if out.is_dir():
        raise ReportError(f"--out is {out}, which is a folder: give the name of a file in it")
    if not out.parent.is_dir():
        raise ReportError(f"--out is {out}, but there is no folder {out.parent}: make it, or give another --out")
    runs = read_runs(options.runs)
    write_report(runs, out, options.format, options.usd_per_gpu_hour)
    for run in runs:
        print(f"{run.name}: {run.state}")
        for lack in run.missing:
            print(f"  {lack}")
    print(f"{out}: {decimal(out.stat().st_size)}")
    return 0


def write_report(runs: Sequence[Run], out: Path, form: str = "html", usd_per_gpu_hour: float | None = None) -> None:
    """Write the report on runs to a file, all or nothing.

    Args:
        runs: from `read_runs`.
        out: the file.
        form: one of `FORMATS`.
        usd_per_gpu_hour: price of a GPU, to state what the hours cost; None: no price.

    Raises:
        OperationError: it cannot be written.
    """
    content = FORMATS[form](runs, usd_per_gpu_hour)
    try:
        with replaced(out) as draft:
            draft.write_text(content, encoding="utf-8")
    except OSError as error:
        raise OperationError(
            f"the report {out} cannot be written: {error.strerror or error}; free some space, or choose another file"
        ) from None
