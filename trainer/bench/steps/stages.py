"""The speed of a whole run from that of its stages, and that of two runs in turns."""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack

from trainer.bench.steps.measured import MeasuredPart
from trainer.bench.steps.timing import TIMES, Report, joined, time_steps
from trainer.engine.ranks import Ranks


def time_run(
    parts: Sequence[MeasuredPart],
    flops_per_image: float | None = None,
    *,
    ranks: Ranks | None = None,
    nchw: bool = False,
) -> Report:
    """Measure how fast a run trains: each of its stages, one after the other in this process.

    Args:
        parts: its stages; the first round of each is a warm-up.
        flops_per_image: FLOPs of both updates per image, the mean of the run; None: count them, which takes seconds.
        ranks, nchw: as in `open_loop`.

    Returns:
        As `time_steps`. Of several stages, whose images have the shares that the config gives them: rates, times, FLOPs
        and mfu are means over the run, and NAME/images_per_s is the rate of each stage; first_step_s is that of the
        first stage, peak_memory_gib the largest.
    """
    with ExitStack() as stack:
        ranks = ranks or stack.enter_context(joined(parts[0].config))
        reports = [time_steps(part.config, flops_per_image, ranks=ranks, nchw=nchw) for part in parts]
    if len(parts) == 1:
        return reports[0]
    weighted = [(part.share, report) for part, report in zip(parts, reports, strict=True)]
    rate = 1 / sum(share / report["images_per_s"] for share, report in weighted)
    flops = sum(share * report["flops_per_image"] for share, report in weighted)
    peak = max(report["matmul_flops_per_s"] for report in reports)
    return {
        "images_per_s": rate,
        **{f"{part.name}/images_per_s": report["images_per_s"] for part, report in zip(parts, reports, strict=True)},
        **{name: sum(share * report.get(name, 0.0) for share, report in weighted) for name in TIMES},
        "first_step_s": reports[0]["first_step_s"],
        "peak_memory_gib": max(report["peak_memory_gib"] for report in reports),
        "flops_per_image": flops,
        "matmul_flops_per_s": peak,
        "mfu": rate * flops / peak,
    }


def compare_runs(
    ours: Sequence[MeasuredPart], theirs: Sequence[MeasuredPart], turns: int, *, nchw: bool = False
) -> Report:
    """Measure two runs in turns, so that a machine whose speed changes affects both.

    Args:
        ours, theirs: as in `time_run`.
        turns: how often each is measured.
        nchw: as in `open_loop`.

    Returns:
        Medians over the turns: images_per_s and baseline_images_per_s; speedup, the median over the turns.
    """
    with joined(ours[0].config) as ranks:

        def rate(parts: Sequence[MeasuredPart]) -> float:
            # FLOPs are not reported: any number saves counting them.
            return time_run(parts, 1.0, ranks=ranks, nchw=nchw)["images_per_s"]

        pairs = [(rate(ours), rate(theirs)) for _ in range(turns)]
    return {
        "images_per_s": statistics.median(a for a, _ in pairs),
        "baseline_images_per_s": statistics.median(b for _, b in pairs),
        "speedup": statistics.median(a / b for a, b in pairs),
    }
