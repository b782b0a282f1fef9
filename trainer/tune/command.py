"""Finds the fastest settings of a config for this machine: `python -m trainer.tune --config NAME --minutes 5`.

Tries precision, fused operators, compilation, micro-batch, engine, CUDA graphs, ZeRO stages and loader processes. On a
CPU it tries ranks and threads instead of what only a GPU has, and bfloat16 if the CPU multiplies it. Each trial trains
for some steps with the real frequency of R1, in a process of its own: one that runs out of memory, crashes or hangs is
only a row of the table. Ctrl-C ends the search; what was found until then is kept.
"""

import argparse
import json
import shlex
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from data.storage.arguments import whole_number
from data.storage.errors import OperationError, StoppedError, UserError, as_command
from data.storage.files import replaced
from data.storage.paths import path_argument
from data.storage.redaction import redact
from trainer.bench.made_images import make_images
from trainer.bench.steps.timing import count_flops
from trainer.bench.trial import Outcome, for_this_machine, hardware, run_trial, set_words
from trainer.config.command_line import add_config_arguments, check_data, check_device, start_logging
from trainer.config.io import dump_config, load_config
from trainer.config.train_config import TrainConfig, split_batch
from trainer.tune.candidates import CHANGE_THE_RESULT, Machine, Settings
from trainer.tune.search import Row, Search

LONGEST_SHARE, LONGEST_S = 1 / 3, 60.0
"""A trial may take this share of the time, or these seconds if that is more: one that hangs leaves time for others."""
ROUNDS = 2
"""Timed intervals of R1 in a trial, after one to warm up."""
HEADER = f"{'images/s':>10}{'MFU':>8}{'GB':>7}{'1st step':>10}  settings"


def override(name: str, value: Any) -> str:
    """A setting as `--set` takes it."""
    return f"{name}={value if isinstance(value, str) else json.dumps(value)}"


def in_words(settings: Settings) -> str:
    """The settings of a row; a star marks those that change what training computes."""
    words = (f"{override(name, value)}{'*' * (name in CHANGE_THE_RESULT)}" for name, value in settings.items())
    return " ".join(words) or "as given"


def line_of(row: Row) -> str:
    """A row as a line of the table."""
    report, settings = row.outcome.report, in_words(row.settings)
    if report is None:
        return f"{'':>10}{'':>8}{'':>7}{'':>10}  {settings}: {row.outcome.failure}"
    best = "  <- best so far" if row.is_best and row.settings else ""
    return (
        f"{report['images_per_s']:>10.4g}{report['mfu']:>8.1%}{report['peak_memory_gib']:>7.2f}"
        f"{report['first_step_s']:>8.1f} s  {settings}{best}"
    )


def yaml_of(row: Row, *, name: str, machine: str) -> str:
    """A config file with the best settings, and how they were found."""
    report = row.outcome.report
    assert report is not None
    lines = [
        f"# {name} with the fastest settings that trainer.tune found: {report['images_per_s']:.4g} images/s",
        f"# on {machine}, {date.today()}.",
        *(f"#   --set {override(setting, value)}" for setting, value in row.settings.items()),
    ]
    return redact("\n".join(lines) + "\n" + dump_config(row.config))


@as_command(name="trainer.tune", interrupted="stopped before anything was measured")
def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 1: nothing could be measured; 2: arguments, config or data are wrong; 130: Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.tune", description=(__doc__ or "").split("\n\n")[1], allow_abbrev=False
    )
    add_config_arguments(parser)
    parser.add_argument("--minutes", type=whole_number(1), default=5, metavar="N", help="how long to search (5)")
    parser.add_argument(
        "--write", type=path_argument, metavar="FILE.yaml", help="write a config with the best settings so far"
    )
    parser.add_argument("--made-images", action="store_true", help="random images instead of those of data.path")
    options = parser.parse_args(arguments)
    start_logging(0)
    _check_file(options.write)
    ends_at = time.monotonic() + 60 * options.minutes
    overrides = for_this_machine(options.set)
    given = load_config(options.config, overrides)
    check_device(given)
    if not options.made_images:
        check_data(given)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    try:
        with tempfile.TemporaryDirectory(prefix="ddgan-tune-") as folder:
            return _search(options, given, overrides, Path(folder), ends_at)
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_file(file: Path | None) -> None:
    if file is not None and (file.suffix not in (".yaml", ".yml") or not file.parent.is_dir()):
        raise UserError(f"--write is {file}: give the name of a file that ends in .yaml, in a folder that exists")


def _search(
    options: argparse.Namespace, given: TrainConfig, overrides: Sequence[str], folder: Path, ends_at: float
) -> int:
    def load(settings: Settings) -> TrainConfig:
        return load_config(options.config, [*overrides, *(override(*setting) for setting in settings.items())])

    machine = Machine.here()
    words = hardware(given.scaling.device)
    data = [f"data.path={make_images(given, folder)}"] if options.made_images else []
    search = Search(
        load=load,
        measure=_measure(options.config, [*overrides, *data], count_flops(given), folder, machine),
        machine=machine,
        time_left=lambda: ends_at - time.monotonic(),
        longest_trial_s=max(LONGEST_S, 60 * options.minutes * LONGEST_SHARE),
    )
    print(f"{words}: {_what_is_measured(given, machine)}\n{HEADER}", flush=True)
    rows: list[Row] = []
    stopped = False
    try:
        for row in search.rows():
            rows.append(row)
            print(line_of(row), flush=True)
            if row.is_best and options.write:
                with replaced(options.write) as draft:
                    draft.write_text(yaml_of(row, name=options.config, machine=words), encoding="utf-8")
    except KeyboardInterrupt:
        stopped = True
    if search.best is None:
        if stopped:
            raise StoppedError("stopped before anything was measured")
        raise OperationError(
            f"nothing could be measured: {rows[0].outcome.failure if rows else 'the time was too short'}. Give more "
            "--minutes, or a smaller training.global_batch_size"
        )
    print(closing_words(rows, search.best, options.write), flush=True)
    if stopped:
        raise StoppedError("stopped; the best settings so far are above")
    return 0


def _what_is_measured(config: TrainConfig, machine: Machine) -> str:
    split, ranks = split_batch(config), machine.ranks(config)
    if ranks == split.world_size:
        return f"{ranks} rank{'s' * (ranks > 1)}, {split.global_batch_size} images a step"
    return (
        f"one rank of {split.world_size}, with its {split.rank_batch_size} of {split.global_batch_size} images a step"
    )


def _measure(
    name: str, overrides: Sequence[str], flops: float, folder: Path, machine: Machine
) -> Callable[[TrainConfig, Settings, float], Outcome]:
    def measure(config: TrainConfig, settings: Settings, limit_s: float) -> Outcome:
        chosen = [*overrides, *(override(*setting) for setting in settings.items())]
        command = ["trainer.bench", "steps", "--config", name, "--json", "--rounds", str(ROUNDS)]
        command += ["--flops-per-image", f"{flops:.6g}", *set_words(chosen)]
        return run_trial(command, limit_s, folder / "trial.log", ranks=machine.ranks(config))

    return measure


def closing_words(rows: Sequence[Row], best: Row, file: Path | None) -> str:
    """What was found, and the command that trains with it."""
    first = rows[0].images_per_s
    times = f", {best.images_per_s / first:.2f} times as given" if first and best.settings else ""
    lines = [f"best of {len(rows)}: {in_words(best.settings)} ({best.images_per_s:.4g} images/s{times})"]
    if CHANGE_THE_RESULT & best.settings.keys():
        lines.append("* changes what training computes; all other settings change only speed, memory and rounding")
    if file is not None:
        shown = f"{file}" if file.is_absolute() else f"./{file}"
        lines.append(f"train with them: python -m trainer.run --config {shlex.quote(shown)}")
    elif best.settings:
        lines.append(f"train with them: {shlex.join(set_words([override(*s) for s in best.settings.items()]))}")
    return "\n".join(lines)
