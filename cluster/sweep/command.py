"""Train a config with each combination of varied settings: `./launch.sh sweep`.

The runs share the Ray in RAY_ADDRESS, or one that is started on this machine: one after the other, or side by side
where there is room. To go on after a stop, give the same command again: finished runs are not repeated, others resume.
Exit codes: 0, all runs are finished, or stopped by ASHA; 1, a run failed; 2, something is wrong, and nothing was
started; 75, stopped before the end.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from cluster.sweep.combinations import SweepRun, make_runs, varied
from cluster.sweep.table import progress_of, stopped_by_asha, table_of, write_table
from data.processes.ray_environment import set_up_ray
from data.storage.errors import StoppedError, UserError, as_command
from trainer.checkpoint.resume import Resume
from trainer.config.command_line import add_config_arguments, start_logging
from trainer.config.sections import FIGURES
from trainer.driver.start import check_before_start
from trainer.plan.preset import add_preset_arguments, preset_words
from trainer.report.command import write_report
from trainer.report.runs import read_runs
from trainer.run import STOPPED

REPORT = "report.html"
"""File with the report on all runs that have begun, in their folder."""
_LARGE_IS_GOOD = frozenset({"inception_score", "class_score_lite0", "precision", "recall", "density", "coverage"})


@as_command(interrupted="stopped; the same command resumes")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _parse(arguments)
    start_logging(0)
    settings = [*options.set, *_settings_of_asha(options)]
    runs = make_runs(options.config, preset_words(options), settings, options.vary)
    folder = runs[0].directory.parent
    if options.dry_run:
        print("\n".join(shlex.join(["python", "-m", "trainer.run", *run.arguments]) for run in runs))
        return 0
    left = _left(runs, options.asha)
    codes: dict[str, int] = {}
    if left:
        set_up_ray()
        from cluster.sweep.tuner import sweep  # takes seconds

        codes = sweep(left, folder, options.asha, lambda words: print(words, file=sys.stderr, flush=True))
    table = table_of(runs)
    print(f"{table}\n\nthis table   {write_table(folder, table)}")
    if begun := [run.directory for run in runs if (run.directory / "config.yaml").is_file()]:
        write_report(read_runs(begun), folder / REPORT)
        print(f"their report {folder / REPORT}")
    if any(code not in (0, STOPPED) for code in codes.values()):
        return 1
    if any(not progress_of(run).finished and not (options.asha and stopped_by_asha(run)) for run in runs):
        raise StoppedError("stopped; the same command resumes", STOPPED)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./launch.sh sweep",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--vary",
        type=varied,
        action="append",
        required=True,
        metavar="SECTION.KEY=V1,V2",
        help="values of a setting; with several --vary, every combination. 0-4 stands for 0,1,2,3,4",
    )
    parser.add_argument(
        "--asha",
        metavar="FIGURE",
        help="stop runs early whose evaluations are worse than those of others by this figure, such as fid (ASHA)",
    )
    parser.add_argument("--dry-run", action="store_true", help="check all runs and print their commands, then exit")
    add_preset_arguments(parser)
    return parser.parse_args(arguments)


def _settings_of_asha(options: argparse.Namespace) -> list[str]:
    """Settings that give every checkpoint an evaluation; the config's own rules refuse what does not go together."""
    if options.asha is None:
        return []
    if options.asha not in FIGURES:
        raise UserError(f"--asha is {options.asha}; allowed are figures of evaluations: {', '.join(sorted(FIGURES))}")
    mode = "max" if options.asha in _LARGE_IS_GOOD else "min"
    return [f"checkpoint.keep_best={options.asha}", f"checkpoint.keep_best_mode={mode}"]


def _left(runs: Sequence[SweepRun], asha: str | None) -> list[SweepRun]:
    """The runs that are to be trained, after the checks that each makes before its own start.

    Raises:
        UserError: one of them would be refused.
    """
    left = []
    for run in runs:
        if asha and stopped_by_asha(run):
            continue
        try:
            # Each run checks the hashes of its data at its own start.
            check_before_start(replace(run.config, data=replace(run.config.data, verify="size")), Resume())
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from error
        if not progress_of(run).finished:
            left.append(run)
    return left
