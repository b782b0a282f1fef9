"""Makes all measurements of a GPU in a given number of minutes: `trainer.bench gpu`.

The parts run in a fixed order. Each gets its share of the minutes that are left, and what it does not use goes to the
next ones. Each measurement is a process of its own and is written down when it ends, so that an end in the middle loses
only what was not reached. Nothing here needs Ray.
"""

import importlib.util
import math
import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from data.shards.index import load_index
from data.storage.location import DataError
from trainer.bench.ladder import Row, rows
from trainer.bench.made_images import make_images
from trainer.bench.results import BASELINE, Result, Results, line_of
from trainer.bench.steps.timing import count_flops
from trainer.bench.trial import Outcome, for_this_machine, hardware, read_outcome, run_process, run_trial, set_words
from trainer.config.io import load_config
from trainer.config.stages import of_length, stages_of
from trainer.config.train_config import TrainConfig
from trainer.plan.cost import count_costs
from trainer.sample.draw import images_at_once

SHARES = {"tests": 12, "steps": 25, "sampling": 8, "kernels": 4, "training": 14}
"""Of the minutes that are left, each part's share; steps, sampling and kernels once per config."""
ONE_RANK = ("scaling.world_size=1", "scaling.min_world_size=null", "training.micro_batch_size=null")
SHORTEST_S = 10.0
"""A measurement is not started with less time: the start of a process takes most of that."""
FAIR_SHARES = 2.5
"""A measurement may take this many times its even share of its part, so that one that hangs leaves time for others."""
EVALUATION_S = 40.0
"""Time of the training part that is kept for starting and evaluating each of the runs."""
SHORTEST_TRAINING_S = 15.0
BATCHES_DRAWN = 16
BASELINE_ROWS = ("eager NCHW fp32", "eager NCHW tf32")
"""The authors' update is timed with the settings of the last of these rows that exists, and at its batch."""
NUM_SAMPLES = 1000


@dataclass
class GpuBench:
    """The parts, with what they share.

    Attributes:
        configs: names, in order; the first one is trained, with the baseline as well, and others that have its data.
        overrides: the user's.
        out: folder of the results, the logs and images that are made.
        ends_at: `time.monotonic()` of the end.
        say: takes each line of progress.
    """

    configs: Sequence[str]
    overrides: Sequence[str]
    out: Path
    ends_at: float
    say: Callable[[str], None]
    _part_ends_at: float = 0.0

    def __post_init__(self) -> None:
        self.overrides = [*for_this_machine(self.overrides), *ONE_RANK]
        first = load_config(self.configs[0], self.overrides)
        self._on_gpu = first.scaling.device == "gpu"
        self._device = hardware(first.scaling.device)
        memory = torch.cuda.get_device_properties(0).total_memory if self._on_gpu else psutil.virtual_memory().total
        self._memory_gib = memory / 2**30
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        self.results = Results(self.out)

    def run(self) -> None:
        """Run every part that has no result yet."""
        parts: list[tuple[str, str, Callable[[str], None]]] = [("tests", "", self._tests)]
        for name, work in (("steps", self._steps), ("sampling", self._sampling), ("kernels", self._kernels)):
            parts += [(name, config, work) for config in self.configs]
        parts.append(("training", self.configs[0], self._training))
        self.say(f"{self._device}; the results are in {self.out}/results.jsonl and results.md")
        for number, (name, config, work) in enumerate(parts):
            shares = [SHARES[of] for of, _, _ in parts[number:]]
            left_s = max(0.0, self.ends_at - time.monotonic())
            seconds = left_s * shares[0] / sum(shares)
            self._part_ends_at = time.monotonic() + seconds
            self.say(f"-- {name} {config}: at most {seconds:.0f} of {left_s:.0f} s")
            work(config)

    def _measure(
        self,
        part: str,
        config: str,
        what: str,
        arguments: Sequence[str],
        *,
        still: int = 1,
        run: Callable[[Sequence[str], float, Path], Outcome] | None = None,
        more: dict[str, Any] | None = None,
        rate: str = "",
    ) -> Result:
        """Run one measurement, unless there is a result of it.

        Args:
            part, config, what: its place in the tables.
            arguments: of `python -m`.
            still: number of measurements left in this part, with this one.
            run: how; `run_trial` unless given.
            more: added to its report.
            rate: the entry of its report that is its `images_per_s`, if it has another name.
        """
        command = shlex.join(["python", "-m", *arguments])
        if done := self.results.done(command, self._device):
            self.say(f"{line_of(done)} (measured before)")
            return done
        left_s = self._part_ends_at - time.monotonic()
        if left_s < SHORTEST_S:
            return self._add(part, config, what, command, failure=f"not reached: {max(0.0, left_s):.0f} s were left")
        log = self.out / "logs" / f"{re.sub(r'[^a-z0-9]+', '-', f'{part} {config} {what}'.lower())}.log"
        limit_s = min(left_s, max(FAIR_SHARES * left_s / still, SHORTEST_S))
        outcome = (run or run_trial)(arguments, limit_s, log)
        report = outcome.report or {}
        if report and rate:
            report = {"images_per_s": report[rate]}
        return self._add(
            part,
            config,
            what,
            command,
            seconds=round(outcome.seconds, 1),
            report=report | (more or {}) if report else {},
            failure=outcome.failure,
            final=outcome.report is not None or outcome.out_of_memory,
        )

    def _add(
        self,
        part: str,
        config: str,
        what: str,
        command: str,
        *,
        seconds: float = 0.0,
        report: dict[str, Any] | None = None,
        failure: str = "",
        final: bool = False,
    ) -> Result:
        """Write down a result."""
        result = Result(
            part=part,
            config=config,
            what=what,
            command=command,
            device=self._device,
            date=str(date.today()),
            seconds=seconds,
            report=report or {},
            failure=failure,
            final=final,
        )
        self.results.add(result)
        self.say(line_of(result))
        return result

    def _skip(self, part: str, config: str, what: str, why: str) -> None:
        """Write down why something is not measured."""
        self._add(part, config, what, f"# {part} {config} {what}", failure=why)

    def _tests(self, config: str) -> None:
        root = Path(__file__).parents[2]
        files = [
            file.relative_to(root).as_posix()
            for file in sorted((root / "tests").rglob("test_*.py"))
            if "pytest.mark.gpu" in file.read_text(encoding="utf-8")
        ]
        if not self._on_gpu or not files or importlib.util.find_spec("pytest") is None:
            self._skip("tests", "", "pytest -m gpu", "skipped: needs a GPU, the folder tests and pytest")
            return
        arguments = ["pytest", "-q", "-m", "gpu and not slow", "-o", "addopts=", "--import-mode=importlib"]
        arguments += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", str(root)]
        self._measure("tests", "", "pytest -m gpu", [*arguments, *(str(root / file) for file in files)], run=run_tests)

    def _steps(self, config: str) -> None:
        given = load_config(config, self.overrides)
        batch = given.training.global_batch_size
        flops = ["--flops-per-image", f"{count_flops(given):.6g}"]
        # The first batch to try; later ones start from what fitted before.
        saved = count_costs(given).saved_bytes / 2**30
        while saved * batch / given.training.global_batch_size > self._memory_gib and (
            half := self._half(given, batch)
        ):
            batch = half
        table, baseline, named, more = rows(), [], "", {}
        for number, row in enumerate(table):
            if row.overrides is None:
                self._skip("steps", config, row.name, "skipped: this version has no setting for it")
                continue
            batch = self._largest(config, given, row, flops, batch, len(table) + 1 - number)
            if row.name in BASELINE_ROWS:
                baseline, named = [*row.overrides, f"training.global_batch_size={batch}"], row.name
                more = {"batch": batch}
        if given.stages:  # the authors train no denoiser first
            baseline, named = [*baseline, "stages={}"], f"{named}, the last stage alone"
        arguments = self._arguments("steps", config, baseline)
        self._measure(
            "steps",
            config,
            f"{BASELINE}, {named}",
            [*arguments, "--nchw", "--compare-authors-update", "--rounds", "1"],
            more=more,
            rate="authors_images_per_s",
        )

    def _largest(self, config: str, given: TrainConfig, row: Row, flops: list[str], batch: int, still: int) -> int:
        """Measure one row at the largest batch that fits. Returns that batch, or the last one if none fits."""
        too_large = False
        more = [*(["--nchw"] if row.nchw else []), "--rounds", "2", *flops]
        while True:
            settings = [*(row.overrides or []), f"training.global_batch_size={batch}"]
            arguments = [*self._arguments("steps", config, settings), *more]
            measured = self._measure(
                "steps", config, f"{row.name}, batch {batch}", arguments, still=still, more={"batch": batch}
            )
            if measured.failure == "out of memory" and (half := self._half(given, batch)):
                batch, too_large = half, True
            elif (
                measured.report
                and not too_large
                and 2 * measured.report["peak_memory_gib"] < self._memory_gib
                and 2 * batch <= given.training.global_batch_size
            ):
                batch *= 2
            else:
                return batch

    @staticmethod
    def _half(given: TrainConfig, batch: int) -> int:
        """Half the batch in whole groups of the minibatch deviation; 0 if that is none."""
        group = given.discriminator.stddev_group_size
        return batch // 2 // group * group

    def _arguments(self, command: str, config: str, settings: Sequence[str] = ()) -> list[str]:
        data = [f"data.path={path}" for path in [self._made(config)] if path]
        words = set_words([*self.overrides, *data, *settings])
        return ["trainer.bench", command, "--config", config, "--json", *words]

    def _made(self, name: str) -> Path | None:
        """Made images for a config whose data set is not there; None if it is."""
        config = load_config(name, self.overrides)
        try:
            load_index(config.data.path)
        except DataError:
            folder = self.out / "data" / Path(name).stem
            made = folder / "made-shards"
            if not (made / "index.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                made = make_images(config, folder)
            return made.absolute()
        return None

    def _sampling(self, config: str) -> None:
        size = load_config(config, self.overrides).data.image_size
        number = BATCHES_DRAWN * images_at_once(size, fast=self._on_gpu)
        self._measure(
            "sampling", config, f"{number} images", [*self._arguments("sampling", config), "--num", f"{number}"]
        )

    def _best(self, config: str) -> Result | None:
        """The fastest row of the steps."""
        rows = [r for r in self.results.of("steps", config) if not r.what.startswith(BASELINE)]
        return max(rows, key=lambda row: row.report["images_per_s"], default=None)

    @staticmethod
    def _settings(row: Result) -> list[str]:
        """The overrides of a row."""
        words = shlex.split(row.command)
        return [after for word, after in pairwise(words) if word == "--set"]

    def _kernels(self, config: str) -> None:
        best = self._best(config)
        if best is None:
            self._skip("kernels", config, "of the fastest row", "not reached: no row of the steps was measured")
            return
        arguments = ["trainer.bench", "kernels", "--config", config, "--json", *set_words(self._settings(best))]
        self._measure("kernels", config, best.what, arguments)

    def _training(self, config: str) -> None:
        """Train with the fastest row of each config that has these data, and with the baseline, for equal seconds."""
        data = load_config(config, self.overrides).data.path
        rivals = [name for name in dict.fromkeys(self.configs) if load_config(name, self.overrides).data.path == data]
        best = {name: row for name in rivals if (row := self._best(name))}
        rows = self.results.of("steps", config)
        baseline = next((row for row in rows if row.what.startswith(BASELINE)), None)
        runs = [*best.items(), *([(config, baseline)] if baseline else [])]
        earlier = [r.report["seconds"] for r in self.results.of("training", config)]
        seconds = earlier[0] if earlier else training_seconds(self._part_ends_at - time.monotonic(), len(runs))
        why = "" if config in best and baseline else "not reached: the steps were not measured"
        if not why and seconds < SHORTEST_TRAINING_S:
            why = f"not reached: {max(0, seconds)} s were left for each run"
        if why:
            self._skip("training", config, "quality after equal minutes", why)
            return
        for number, (name, row) in enumerate(runs):
            self._train(name, row, seconds, len(runs) - number, listed_under=config)

    def _train(self, config: str, row: Result, seconds: float, still: int, *, listed_under: str) -> None:
        """Train for as many images as the row's speed makes in the time, then evaluate. The result is in the table of
        the config `listed_under`.

        What the config counts in images keeps its share of the run. The authors' update gives D the same gradient as
        ours, so their images are trained with our update.
        """
        batch = row.report["batch"]
        given = load_config(config, self._settings(row))
        shares = [stage.config.training.total_images / given.training.total_images for stage in stages_of(given)]
        enough = math.ceil(2 / min(shares)) if given.stages else 1  # for a whole step of each stage
        steps = max(enough, round(row.report["images_per_s"] * seconds / batch))
        directory = self.out / "training" / re.sub(r"[^a-z0-9]+", "-", f"{config} {row.what}".lower())
        settings = [
            *self._settings(row),
            *of_length(given, steps * batch),
            f"training.ema_decay={max(0.0, 1 - 10 / steps):.6g}",  # averages a tenth of the run
            f"run.directory={directory.absolute()}",
            "tracking.backends=[]",
            "tracking.register_as=null",
            "grids.interval_steps=null",
            "checkpoint.save_interval_steps=null",
            "checkpoint.keep_best=null",
            "evaluation.interval_images=null",
        ]
        data = load_config(config, settings).data.path

        def run(arguments: Sequence[str], limit_s: float, log: Path) -> Outcome:
            shutil.rmtree(directory, ignore_errors=True)
            ended = run_process(arguments, limit_s, log)
            if ended.code != 0:
                return read_outcome(ended, log.read_text(errors="replace"))
            words = [
                "trainer.evaluate",
                "--run",
                str(directory),
                "--reference",
                data,
                "--num",
                f"{NUM_SAMPLES}",
                "--json",
            ]
            found = run_trial(words, max(SHORTEST_S, limit_s - ended.seconds), log.with_suffix(".evaluation.log"))
            if found.report is None:
                return found
            quality = found.report["quality"] or {}
            figures = {name: float(quality[name]) for name in ("recall", "coverage") if quality.get(name) is not None}
            return Outcome({"frechet_ratio": found.report["ratio"]} | figures, "", ended.seconds + found.seconds)

        made = "made images" if self._made(config) else data
        named = row.what if config == listed_under else f"{config}, {row.what}"
        self._measure(
            "training",
            listed_under,
            f"{named}: {seconds:.0f} s of steps, data: {made}",
            ["trainer.worker", "--config", config, *set_words(settings)],
            still=still,
            run=run,
            more={"images": steps * batch, "seconds": seconds},
        )


def training_seconds(left_s: float, runs: int) -> int:
    """Seconds for the steps of each run."""
    return int(left_s / max(1, runs) - EVALUATION_S)


def run_tests(arguments: Sequence[str], limit_s: float, log: Path) -> Outcome:
    """Run pytest; its report has the numbers of its last line, and the tests that failed."""
    ended = run_process(arguments, limit_s, log)
    log.write_text(ended.printed + log.read_text(errors="replace"))
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", ended.printed)
    }
    if ended.code is None or not counts:
        return read_outcome(ended, log.read_text(errors="replace"))
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) (\S+)", ended.printed)
    return Outcome(counts | {"failing": " ".join(failed) or "none"}, "", ended.seconds)
