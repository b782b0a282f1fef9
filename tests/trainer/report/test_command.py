"""The command: one file for each format, the same for the same runs; what it refuses, and what it says is missing."""

import errno
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.launch import exit_code
from tests.trainer.report.made import Clock, Life, digest_of, live_twice, made_run
from trainer.checkpoint.lease import Lease, acquire
from trainer.checkpoint.lease_places import FolderLease
from trainer.report.command import main
from trainer.report.curves import MAX_BUCKETS, charts_of, thinned
from trainer.report.runs import MAX_GRIDS

EVIL = "<script>alert(1)</script>\"'&|*"


class Seen(HTMLParser):
    """Elements of a page, and what its attributes ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]


def trained(directory: Path, *overrides: str) -> Path:
    """A run with an event log in which a start was killed."""
    made_run(directory, *overrides)
    live_twice(directory, Clock(), pause_s=100, tags={"git_commit": "c" * 40, "version.torch": "2.0"})
    return directory


def report(out: Path, *arguments: object) -> str:
    assert exit_code(main, [*map(str, arguments), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_the_same_command_gives_the_same_bytes_in_every_format(tmp_path: Path) -> None:
    run, other = trained(tmp_path / "a"), trained(tmp_path / "b", "run.seed=1")
    for form in ("html", "md", "json"):
        files = [tmp_path / f"{form}{i}" for i in range(2)]
        for file in files:
            report(file, run, other, "--format", form, "--usd-per-gpu-hour", "2.5")
        assert digest_of(files[0]) == digest_of(files[1])


def test_json_has_the_numbers_and_markdown_and_page_the_same_tables(tmp_path: Path) -> None:
    run, other = trained(tmp_path / "a"), trained(tmp_path / "b", "run.seed=1")
    first, second = json.loads(report(tmp_path / "r.json", run, other, "--format", "json"))
    assert first["curves"]["loss_g"] == [[5, 0.5], [10, 0.25], [15, 0.75]]
    assert first["hours"]["lost_steps"] == 2
    assert first["hours"]["seconds"]["away"] == pytest.approx(100)
    assert (first["config"]["run.seed"], second["config"]["run.seed"]) == (0, 1)
    text, page = report(tmp_path / "r.md", run, other, "--format", "md"), report(tmp_path / "r.html", run, other)
    for words in ("Where the hours went", "lost work, done again", "Differences of the configs", "run.seed", "c" * 12):
        assert words in text
        assert words in page
    assert "Young" in page


def test_price_is_that_of_the_gpu_hours(tmp_path: Path) -> None:
    made_run(tmp_path / "a")
    life = Life(tmp_path / "a", Clock(), device="NVIDIA H200", world_size=8)
    life.resume(0, 1800)
    life.steps(1, 2, g=2700)
    life.sheet.close(status="FINISHED")
    text = report(tmp_path / "r.md", tmp_path / "a", "--format", "md", "--usd-per-gpu-hour", "2.5")
    assert re.search(r"GPU-hours \| 16 \|", text)
    assert "| USD, at 2.50 a GPU-hour | 40.00 |" in text


def test_nothing_of_a_run_becomes_markup_and_the_page_asks_for_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    made_run(folder, f"tracking.experiment={json.dumps(EVIL)}", curves={EVIL: [(1, 2.0)], "loss_g</script>": [(1, 2)]})
    life = Life(folder, Clock(), processor=EVIL, tags={"git_commit": EVIL, f"version.{EVIL}": EVIL})
    life.sheet.tell("restarted", reason=EVIL)
    life.resume(0, 1)
    life.steps(1, 3, g=1)
    life.die()
    page, seen = report(tmp_path / "r.html", folder, trained(tmp_path / "b")), Seen()
    seen.feed(page)
    assert seen.tags.count("script") == 2
    assert seen.tags.count("img") == 6
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in seen.addresses)
    assert "http:" not in page and "https:" not in page
    assert "<script>alert" not in report(tmp_path / "r.md", folder, "--format", "md")


def test_a_run_of_an_earlier_version_is_reported_without_its_hours(tmp_path: Path, capsys) -> None:
    run = made_run(tmp_path / "old", "tracking.backends=[]")
    (run / "tracking" / "spool.jsonl").unlink()
    for grid in (run / "samples").iterdir():
        grid.unlink()
    page = report(tmp_path / "r.html", run)
    said = capsys.readouterr().out
    for words in ("there is no event log", "tracking.backends is empty", "there are none in the folder samples"):
        assert words in page
        assert words in said


def test_a_running_run_is_reported_and_said_to_run(tmp_path: Path, capsys) -> None:
    run = made_run(tmp_path / "a")
    life = Life(run, Clock())
    life.resume(0, 5)
    life.steps(1, 9, g=1)
    life.die()
    lease: Lease = acquire(FolderLease(run), "a launch")
    try:
        report(tmp_path / "r.html", run)
    finally:
        lease.release()
    assert "a: still running: this is what it has recorded so far" in capsys.readouterr().out
    report(tmp_path / "r.html", run)
    assert "a: killed after step 9; the same command resumes it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--out", "r.html"], "nowhere does not exist: give the directory of a run"),
        (["file", "--out", "r.html"], "file is a file: give the directory of a run"),
        (["empty", "--out", "r.html"], "empty is the folder of no run, as it holds no config.yaml"),
        (["run", "run/../run", "--out", "r.html"], "is given twice"),
        (["run", "--out", "missing/r.html"], "there is no folder missing"),
        (["run", "--out", "empty"], "--out is empty, which is a folder"),
        (["run", "--out", "r.html", "--usd-per-gpu-hour", "-1"], "-1 is not a price"),
        (["run", "--out", "r.html", "--format", "pdf"], "invalid choice: 'pdf'"),
        (["--out", "r.html"], "required: RUN"),
        (["run"], "required: --out"),
    ],
)
def test_what_cannot_be_reported_is_refused_in_one_message(tmp_path, monkeypatch, capsys, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    made_run(Path("run"))
    Path("empty").mkdir()
    Path("file").touch()
    assert exit_code(main, arguments) == 2
    assert words in capsys.readouterr().err
    assert not Path("r.html").exists()


def test_a_report_that_finds_no_room_is_said_in_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = made_run(tmp_path / "run")
    monkeypatch.setattr(Path, "write_text", full)
    assert exit_code(main, [str(run), "--out", str(tmp_path / "r.html")]) == 2
    told = f"the report {tmp_path}/r.html cannot be written: No space left on device; free some space, or choose"
    assert told in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_many_grids_and_points_are_thinned_and_no_extreme_is_lost(tmp_path: Path) -> None:
    points = [(step, float(step % 7)) for step in range(1, 100_001)]
    points[50_000] = (50_001, 1e6)
    kept = thinned(points)
    assert len(kept) <= 2 * MAX_BUCKETS + 2
    assert {points[0], points[-1], (50_001, 1e6)} <= set(kept)
    assert set(kept) <= set(points)
    run = made_run(tmp_path / "a")
    for step in range(20, 200):
        (run / "samples" / f"step-{step:08d}.png").write_bytes((run / "samples" / "step-00000015.png").read_bytes())
    (facts,) = json.loads(report(tmp_path / "r.json", run, "--format", "json"))
    assert len(facts["grids"]) == MAX_GRIDS
    assert (facts["grids"][0], facts["grids"][-1]) == (5, 199)


def test_timesteps_share_a_chart_and_with_several_runs_each_has_its_own() -> None:
    curves = {f"logit_real/t{t}": [(1, float(t))] for t in range(3)}
    (chart,) = charts_of([curves])
    assert (chart.name, [line.part for line in chart.lines]) == ("logit_real", ["t0", "t1", "t2"])
    assert [line.points for line in chart.lines] == [[(1, 0.0)], [(1, 1.0)], [(1, 2.0)]]
    assert [chart.name for chart in charts_of([curves, curves])] == ["logit_real/t0", "logit_real/t1", "logit_real/t2"]


def test_values_that_are_no_numbers_and_a_config_that_is_none_spoil_nothing(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a", curves={"fid": [(1, float("nan"))], "loss_g": [(1, 2.5), (2, float("inf"))]})
    (run / "config.yaml").write_bytes(b"\xff\x00: [")
    for form in ("html", "md"):
        assert "config.yaml cannot be read as a config" in report(tmp_path / "r", run, "--format", form).replace(
            "\\", ""
        )
    (facts,) = json.loads(report(tmp_path / "r.json", run, "--format", "json"))
    assert facts["curves"] == {"loss_g": [[1, 2.5]]}


def test_a_damaged_grid_is_left_out(tmp_path: Path) -> None:
    run = made_run(tmp_path / "a")
    (run / "samples" / "step-00000010.png").write_bytes(b"\x89PNG torn")
    (facts,) = json.loads(report(tmp_path / "r.json", run, "--format", "json"))
    assert facts["grids"] == [5, 15]
