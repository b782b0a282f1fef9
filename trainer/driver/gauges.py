"""Which curves Ray shows to Prometheus, and under which names. Nothing here needs Ray.

Ray puts `ray_` before each name, and adds labels of its own, such as the node's address, to those given here.
"""

import re
from collections.abc import Iterator, Mapping

from trainer.tracking.system import GPU, HOST

TAGS = ("run", "node", "gpu")
"""Labels of every gauge: name of the run's directory, and number of the node and of its GPU, where there is one."""
_OF_RUN = {
    "images_seen": "training images so far",
    "images_per_s": "training images per second of all ranks",
    "step_time_s": "seconds per step, mean over the ranks",
    "step_time_slowest_s": "seconds per step of the slowest rank",
    "step_time_slowest_rank": "the slowest rank",
    "time/data_s": "seconds per step that rank 0 waits for data",
    "peak_memory_gib": "peak memory of rank 0 in GiB",
    "loss_g": "loss of the generator",
    "loss_d_real": "loss of the discriminator at real images",
    "loss_d_fake": "loss of the discriminator at generated images",
    "replaced_samples": "damaged samples that were replaced since the last log point",
    "checkpoint_failures": "checkpoints that could not be saved since the last log point",
}
"""Curves of the run as a whole, with their meanings."""


def _name(curve: str) -> str:
    return f"ddgan_{curve.replace('/', '_')}"


GAUGES: Mapping[str, str] = {
    **{_name(curve): text for curve, text in _OF_RUN.items()},
    **{f"ddgan_node_{curve}": f"{curve} of a node, see docs/tracking.md" for curve in HOST},
    **{f"ddgan_gpu_{curve}": f"{curve} of a GPU, see docs/tracking.md" for curve in GPU},
}
"""Every gauge with its description."""


def gauges_of(curves: Mapping[str, float], run: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each gauge that the curves of a log point have.

    Args:
        curves: as they are logged; those that have no gauge are left out.
        run: name of the run.
    """
    for curve, value in curves.items():
        found = re.fullmatch(r"system/node-(\d+)/(?:gpu-(\d+)/)?(\w+)", curve)
        if found:
            node, gpu, figure = found.groups()
            yield (
                f"ddgan_{'node' if gpu is None else 'gpu'}_{figure}",
                {"run": run, "node": node, "gpu": gpu or ""},
                value,
            )
        elif curve in _OF_RUN:
            yield _name(curve), {"run": run, "node": "", "gpu": ""}, value
