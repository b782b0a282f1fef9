"""Damaged files of a run, read by the report: it says what it can, its hours add up, and its page is well formed."""

import json
import random
from pathlib import Path

import pytest

from tests.data.fuzz import altered, fuzz, mutated
from tests.trainer.report.made import Clock, Life, live_twice, made_run
from trainer.report.hours import read_hours
from trainer.report.pages import page
from trainer.report.runs import read_runs
from trainer.report.texts import as_json, markdown

pytestmark = pytest.mark.fuzz


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a start that was killed, one that finished, and a driver that waited for nodes."""
    run, clock = made_run(tmp_path / "run"), Clock()
    driver = Life(run, clock, "driver")
    live_twice(run, clock, driver)
    driver.sheet.close()
    return run


def line_altered(content: bytes, draws: random.Random) -> bytes:
    """Damaged bytes, or JSON lines with other values in one."""
    lines = content.splitlines()
    if not lines or draws.randrange(3) == 0:
        return mutated(content, draws)
    number = draws.randrange(len(lines))
    lines[number] = json.dumps(altered(json.loads(lines[number]), draws)).encode()
    return b"\n".join([*lines, b""])


@pytest.mark.parametrize("name", ["events/rank-0.jsonl", "events/driver.jsonl", "config.yaml", "lease.json"])
def test_files_that_the_report_reads(name: str, run: Path, pytestconfig: pytest.Config) -> None:
    file = run / name
    good = file.read_bytes() if file.exists() else b'{"process": "a 1 2"}'

    def read(content: bytes) -> None:
        file.write_bytes(content)
        hours = read_hours(run)
        assert hours is None or sum(hours.seconds.values()) == pytest.approx(hours.wall_s, rel=1e-6, abs=0.01)
        runs = read_runs([run])
        assert page(runs, 2.5).endswith("</html>\n")
        assert markdown(runs, 2.5)
        json.loads(as_json(runs, 2.5))

    damage = line_altered if name.endswith("l") and name != "config.yaml" else mutated
    fuzz(pytestconfig, [good], read, damage=damage, num_inputs=60, refusals=())
