"""The parts of a preparation are timed one by one, and the plan follows from their sum."""

import json
from pathlib import Path

import pytest

from data import bench

PARTS = ["read", "decode", "resize", "encode", "write shard, with hash"]


def test_plan_is_the_sum_of_the_parts(class_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prepare", str(class_folder), "--size", "64", "--images", "20", "--plan", "3600000", "--cpus", "4"]
    assert bench.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [part["name"] for part in found["parts"]] == PARTS
    total_ms = sum(part["ms"] for part in found["parts"])
    assert found["images"] == 20
    assert found["plan"]["cpu_hours"] == pytest.approx(total_ms)
    assert found["plan"]["hours"] == pytest.approx(total_ms / 4)
    assert bench.main(command) == 0
    told = capsys.readouterr().out
    assert "3,600,000 images:" in told
    assert all(part.partition(",")[0] in told for part in PARTS)


def test_source_without_a_usable_image_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert bench.main(["prepare", str(tmp_path), "--size", "64"]) == 2
    assert "none of the first 200 images of folder:" in capsys.readouterr().err
