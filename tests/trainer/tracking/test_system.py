"""The curves of the machines: this host's, and a stand-in for NVIDIA's driver."""

import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer.tracking.system import GPU, HOST, SystemMonitor, system_curves

CUDA = torch.device("cuda", 3)


class NVMLError(Exception): ...


def has_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver with one GPU, whose power it does not tell."""

    def by_uuid(uuid: str) -> str:
        if uuid != "GPU-abc":
            raise NVMLError("not found")
        return "handle"

    def power(handle: str) -> int:
        raise NVMLError("not supported")

    driver = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=97),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3 * 2**30),
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetTemperature=lambda handle, kind: 61,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)


def is_gpu(monkeypatch: pytest.MonkeyPatch, uuid: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))


def test_first_rank_of_a_node_measures_its_host(tmp_path: Path) -> None:
    curves = system_curves([SystemMonitor(torch.device("cpu"), tmp_path, local_rank=0).measure()])
    assert curves.keys() == {f"system/node-0/{name}" for name in HOST}
    assert 0 <= curves["system/node-0/cpu_percent"] <= 100
    assert 0.1 < curves["system/node-0/memory_gib"] < 100_000
    assert curves["system/node-0/disk_free_gib"] > 0


def test_other_ranks_measure_nothing_but_their_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(math.isnan, SystemMonitor(torch.device("cpu"), tmp_path, local_rank=1).measure()))
    has_driver(monkeypatch)
    is_gpu(monkeypatch, "abc")
    row = SystemMonitor(CUDA, tmp_path, local_rank=1).measure()
    found = dict(zip((*HOST, *GPU), row, strict=True))
    assert {name: value for name, value in found.items() if not math.isnan(value)} == {
        "utilization_percent": 97.0,
        "memory_gib": 3.0,
        "temperature_celsius": 61.0,
    }


def test_gpu_that_the_driver_does_not_know_is_said_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has_driver(monkeypatch)
    is_gpu(monkeypatch, "other")
    assert all(map(math.isnan, SystemMonitor(CUDA, tmp_path, local_rank=1).measure()))
    assert caplog.record_tuples == [("trainer.tracking.system", logging.WARNING, "no curves of the GPU: not found")]


def test_directory_that_is_gone_has_no_room(tmp_path: Path) -> None:
    curves = system_curves([SystemMonitor(torch.device("cpu"), tmp_path / "gone", local_rank=0).measure()])
    assert curves.keys() == {"system/node-0/cpu_percent", "system/node-0/memory_gib"}
