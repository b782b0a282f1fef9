"""The table of the bytes that a training step moves, by kind of operation."""

from trainer.config.train_config import TrainConfig, planned_precision, split_batch
from trainer.plan.bytes_moved import KINDS, Traffic, total_bytes
from trainer.plan.step_traffic import StepTraffic, count_step

TrafficReport = dict[str, dict[str, float]]
"""For each kind of operation and for their sum: GB of both updates, the penalties and the step, and its operations."""


def report_traffic(config: TrainConfig) -> TrafficReport:
    """Count the bytes of a step of the fullest rank on a GPU; nothing is measured.

    Returns:
        By kind, and as `sum`: 10^9 bytes of `update_d`, `update_g`, `penalties` (in a step that has them), `step` (on
        average), and `operations` of the step, in plain torch. As `fused`: those sums in channels_last with fused
        operators. As `g_alone`: the generator's forward and backward pass, `all`, `convolutions_and_fir`, and `fused`.
    """
    bf16 = planned_precision(config) == "bf16"
    counted, fused = (count_step(config, bf16=bf16, fuses=fuses) for fuses in (False, True))
    parts = _parts(counted)
    report: TrafficReport = {
        kind: {name: traffic[kind].total / 1e9 if traffic else 0.0 for name, traffic in parts.items()}
        | {"operations": counted.whole[kind].num_operations}
        for kind in KINDS
    }
    report["sum"] = {name: sum(row[name] for row in report.values()) for name in (*parts, "operations")}
    report["fused"] = {name: total_bytes(traffic) / 1e9 for name, traffic in _parts(fused).items()}
    report["fused"]["operations"] = sum(moved.num_operations for moved in fused.whole.values())
    own = sum(counted.generator[kind].total for kind in ("convolution", "fir"))
    report["g_alone"] = {
        "all": total_bytes(counted.generator) / 1e9,
        "convolutions_and_fir": own / 1e9,
        "fused": total_bytes(fused.generator) / 1e9,
    }
    return report


def _parts(counted: StepTraffic) -> dict[str, Traffic]:
    return {
        "update_d": counted.update_d,
        "update_g": counted.update_g,
        "penalties": counted.penalties,
        "step": counted.whole,
    }


def traffic_table(config: TrainConfig, report: TrafficReport) -> str:
    """The report as text for a terminal."""
    split, precision = split_batch(config), planned_precision(config)
    rows = [(title, report[kind]) for kind, title in KINDS.items() if any(report[kind].values())]
    alone, whole = report["g_alone"], report["sum"]["step"]
    return "\n".join(
        [
            f"GB (10^9 bytes) that one rank moves in a step of {split.rank_batch_size} images in {precision}",
            f"{'':<28}{'D':>9}{'G':>9}{'penalties':>11}{'step':>9}{'share':>8}{'operations':>12}",
            *(
                f"{title:<28}{row['update_d']:>9.2f}{row['update_g']:>9.2f}{row['penalties']:>11.2f}{row['step']:>9.2f}"
                f"{row['step'] / whole:>8.1%}{row['operations']:>12,.0f}"
                for title, row in (*rows, ("sum", report["sum"]), ("sum with fused operators", report["fused"]))
            ),
            "D, G: their updates. Penalties: what R1 and R2 add to D's update in a step that has them.",
            "Step: on average, with the penalties at their interval.",
            f"G alone, forward and backward of {split.micro_batch_size} images: {alone['all']:.2f} GB, of which "
            f"convolutions and FIR filters {alone['convolutions_and_fir']:.2f}",
            f"The same in channels_last with fused operators: {alone['fused']:.2f} GB",
        ]
    )
