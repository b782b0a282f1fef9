"""What is made of the times of reading, with a clock and a reader with known answers."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.trainer.bench.made_time import MadeTime
from trainer.bench import measurements
from trainer.bench.measurements import time_reading
from trainer.config.io import load_config


@pytest.mark.parametrize(
    ("reading_s", "rate", "share", "longest_s"),
    [
        (0.05, 80.0, 0.0, 0.0),  # a batch takes the device 0.1 s
        (0.2, 40.0, 0.5, 0.1),
    ],
)
def test_waiting_is_what_the_reader_takes_longer_than_the_device(reading_s, rate, share, longest_s, tiny, monkeypatch):
    clock = MadeTime()

    def batches() -> Iterator[SimpleNamespace]:
        while True:
            clock.sleep(reading_s)
            yield SimpleNamespace(images=torch.empty(8))

    monkeypatch.setattr(measurements, "time", clock)
    monkeypatch.setattr(measurements, "open_share", lambda *_, **__: batches())
    found = time_reading(load_config("digits", list(tiny)), images_per_s=80, seconds=100)
    assert found["images_per_s"] == pytest.approx(rate, rel=0.01)
    assert found["waiting_share"] == pytest.approx(share, abs=0.01)
    assert found["longest_wait_s"] == pytest.approx(longest_s, abs=1e-6)
