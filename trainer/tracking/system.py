"""What the machines of a run do, as curves: the host of each node and the GPU of each rank.

They are measured when curves are logged, by asking the operating system and NVIDIA's driver: nothing waits for a GPU.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

log = logging.getLogger(__name__)

HOST = ("cpu_percent", "memory_gib", "disk_free_gib")
"""Curves of a node: use of all cores since the last point; memory in use; room on the file system of run.directory."""
GPU = ("utilization_percent", "memory_gib", "power_watts", "temperature_celsius")
"""Curves of a rank's GPU: share of the last second or less in which a kernel ran; memory in use, by any process."""
_GIB = 2**30


class SystemMonitor:
    """Measures the GPU of this rank and, on the first rank of a node, the host."""

    def __init__(self, device: torch.device, directory: Path, *, local_rank: int | None = None) -> None:
        """Begin the interval that the first point's CPU use is measured over.

        Args:
            device: where this rank computes.
            directory: on the file system whose room is measured.
            local_rank: place of this rank on its node; by default LOCAL_RANK.
        """
        self._directory = directory
        self._is_first = (int(os.environ.get("LOCAL_RANK", 0)) if local_rank is None else local_rank) == 0
        self._gpu = _open_gpu(device) if device.type == "cuda" else None
        psutil.cpu_percent()

    def measure(self) -> list[float]:
        """Values of the curves `HOST` and `GPU`; nan for those that this rank does not measure."""
        host = self._host() if self._is_first else [math.nan] * len(HOST)
        return host + (_of_gpu(*self._gpu) if self._gpu else [math.nan] * len(GPU))

    def _host(self) -> list[float]:
        try:
            free = psutil.disk_usage(str(self._directory)).free / _GIB
        except OSError:
            free = math.nan
        memory = psutil.virtual_memory()
        return [psutil.cpu_percent(), (memory.total - memory.available) / _GIB, free]


def system_curves(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Curves such as `system/node-0/gpu-1/power_watts` from what each rank has measured.

    Args:
        rows: of each rank, in order; the ranks of a node follow each other, the first with values of the host.
    """
    curves: dict[str, float] = {}
    node, gpu = -1, 0
    for row in rows:
        if not math.isnan(row[0]):
            node, gpu = node + 1, 0
        names = [f"system/node-{node}/{name}" for name in HOST]
        names += [f"system/node-{node}/gpu-{gpu}/{name}" for name in GPU]
        curves |= {name: value for name, value in zip(names, row, strict=True) if not math.isnan(value)}
        gpu += 1
    return curves


def _open_gpu(device: torch.device) -> tuple[Any, Any] | None:
    """NVIDIA's library and its handle of the device; None, with a warning, if there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        # By its UUID: NVML's numbers are not CUDA's, and CUDA_VISIBLE_DEVICES does not change them.
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception as error:  # a library without a driver, a part of a GPU (MIG): a run can do without these curves
        log.warning("no curves of the GPU: %s", error)
        return None


def _of_gpu(nvml: Any, handle: Any) -> list[float]:
    questions: tuple[Callable[[], float], ...] = (
        lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / _GIB,
        lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    )
    values = []
    for ask in questions:
        try:
            values.append(float(ask()))
        except nvml.NVMLError:  # some GPUs do not tell everything
            values.append(math.nan)
    return values
