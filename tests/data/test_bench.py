"""The benchmark runs every way of reading and says what it cannot do."""

import json
import os
import signal
from typing import Any

import pytest

from data import bench
from data.bench import main
from data.shards.index import ShardIndex
from data.stream.batches import BatchIterator

pytestmark = pytest.mark.slow


def test_every_way_of_reading_is_timed(prepared: ShardIndex, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seconds", "1", "--rounds", "1", "--workers", "0", "1", "--micro-batch", "8", "--json"]
    assert main([str(prepared.directory), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    ways = [(rate["reader"].split(",")[0], rate["loader_workers"]) for rate in report["rates"]]
    assert ways == [("bare decoder", 0), ("this reader", 0), ("this reader", 1), ("WebDataset", 1), ("image files", 1)]
    assert all(rate["images_per_s"] > 0 for rate in report["rates"])
    assert [rate["private_mb"] is not None for rate in report["rates"]] == [False, False, True, False, False]
    assert [rate["loaders_us"] is not None for rate in report["rates"]] == [False, False, True, False, False]
    for rate in report["rates"]:
        # No process is on a processor for longer than it runs: a second, in which it reads this many images.
        assert 0 < rate["taker_us"] * rate["images_per_s"] < 1.1e6
        assert rate["loaders_us"] is None or 0 < rate["loaders_us"] * rate["images_per_s"] < 1.1e6
    assert report["shuffle"]["ratio"] == pytest.approx(1, abs=0.4)


def test_table_names_the_data_set_and_the_machine(prepared: ShardIndex, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seconds", "1", "--rounds", "1", "--workers", "0", "--micro-batch", "4"]
    assert main([str(prepared.directory), *options]) == 0
    shown = capsys.readouterr().out
    assert "40 images 8x8x3" in shown
    assert "CPUs, torch" in shown
    rows = [line.split("│")[1:3] for line in shown.splitlines() if line.startswith("│")]
    ways = [(reader.strip(), int(workers)) for reader, workers in rows]
    assert ways == [("bare decoder", 0), ("this reader", 0), ("WebDataset", 1), ("image files", 1)]
    assert "neighbours on disk" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{data}", "--workers", "-1"], "'-1' is given, allowed is a whole number of 0 or more"),
        (["{data}", "--seconds", "0"], "'0' is given, allowed is a whole number of 1 or more"),
    ],
)
def test_wrong_arguments_are_refused(
    prepared: ShardIndex, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([argument.format(data=prepared.directory) for argument in arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_missing_data_set_is_one_line(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "no prepared data set" in shown


def test_killed_loader_process_is_one_line(
    prepared: ShardIndex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = bench.open_batches

    def start_and_kill(*arguments: Any, **options: Any) -> BatchIterator:
        batches = started(*arguments, **options)
        for pid in batches.process_ids:
            os.kill(pid, signal.SIGKILL)
        return batches

    monkeypatch.setattr(bench, "open_batches", start_and_kill)
    assert main([str(prepared.directory), "--seconds", "1", "--rounds", "1", "--workers", "1"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("data.bench: loader process ")
    assert "ended with SIGKILL" in shown
    assert "Traceback" not in shown
