"""TensorBoard's event files: what they hold, and that each point is in them once."""

import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from tensorboardX.record_writer import RecordWriter

from tests.trainer.tracking.helpers.waits import Clock
from trainer.tracking.spool import RunRecords, Spool, spool_path
from trainer.tracking.tensorboard_sink import TensorBoardSink, read_events
from trainer.tracking.uploader import Uploader


def report(run: Path, steps: range, last_step: int | None = None, *, new: bool = False) -> None:
    """What one start of a run reports."""
    spool = Spool(run, last_step=last_step, clock_ms=lambda: 1_700_000_000_500)
    if new:
        spool.begin_new_run()
    spool.open(step=last_step, params={"a": "x | y"}, tags={"git_commit": "c0ffee"})
    Image.new("RGB", (3, 2), "red").save(run / "grid.png")
    for step in steps:
        spool.metrics(step, {"loss": step / 4, "rate": 1.0})
    spool.image(steps[-1], "samples", run / "grid.png")
    spool.artifact(run / "grid.png", "snapshot")
    spool.close("FINISHED")


def upload(run: Path) -> None:
    upload_to(TensorBoardSink(str(run / "tensorboard"), run), run)


def upload_to(sink: TensorBoardSink, run: Path) -> None:
    clock = Clock()
    options = {"trainer_lives": lambda: False, "clock": clock, "sleep": clock.sleep}
    assert Uploader(run, "tensorboard", sink, target="there", timeout_s=30, **options).run() == 0


def event_file(run: Path) -> Path:
    (file,) = (run / "tensorboard" / RunRecords(spool_path(run)).uid[:8]).iterdir()
    return file


def held(run: Path) -> Counter[tuple[str, int]]:
    """Tag and step of each value in the run's event file."""
    events = [event for event, _ in read_events(event_file(run))]
    return Counter((value.tag, event.step) for event in events for value in event.summary.value)


EXPECTED = Counter(
    [
        *[(key, step) for step in range(10, 61, 10) for key in ("loss", "rate")],
        *[("samples", 60), ("params", 0), ("tags", 0), ("files/snapshot/grid.png", 0)],
    ]
)


def test_curves_grids_settings_and_places_of_files_are_in_the_event_file(tmp_path: Path) -> None:
    report(tmp_path, range(10, 61, 10))
    upload(tmp_path)
    assert held(tmp_path) == EXPECTED
    events = [event for event, _ in read_events(event_file(tmp_path))]
    assert events[0].file_version == "brain.Event:2"
    values = {(value.tag, event.step): (event, value) for event in events for value in event.summary.value}
    event, loss = values["loss", 30]
    assert (loss.simple_value, event.wall_time) == (7.5, 1_700_000_000.5)
    _, grid = values["samples", 60]
    assert (grid.image.width, grid.image.height, grid.image.colorspace) == (3, 2, 3)
    assert grid.image.encoded_image_string == (tmp_path / "grid.png").read_bytes()
    texts = {tag: b"".join(value.tensor.string_val).decode() for (tag, _), (_, value) in values.items()}
    assert texts["params"] == "| name | value |\n|---|---|\n| a | x \\| y |"
    assert texts["files/snapshot/grid.png"] == "`grid.png`"


def test_event_file_is_byte_for_byte_what_tensorboardx_writes(tmp_path: Path) -> None:
    report(tmp_path, range(10, 61, 10))
    upload(tmp_path)
    theirs = RecordWriter(str(tmp_path / "theirs"))
    for event, _ in read_events(event_file(tmp_path)):
        theirs.write(event.SerializeToString())
    theirs.close()
    assert event_file(tmp_path).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_resumed_run_is_one_line_and_another_run_another_folder(tmp_path: Path) -> None:
    report(tmp_path, range(10, 41, 10))
    upload(tmp_path)
    report(tmp_path, range(30, 61, 10), last_step=20)  # it was ahead of its checkpoint
    upload(tmp_path)
    assert {name: number for name, number in held(tmp_path).items() if name in EXPECTED} == EXPECTED
    assert held(tmp_path)["loss", 30] == held(tmp_path)["rate", 40] == 1
    report(tmp_path, range(10, 21, 10), new=True)
    upload(tmp_path)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert [held(tmp_path)["loss", step] for step in (10, 20, 30)] == [1, 1, 0]


@pytest.mark.parametrize("cut", [1, 40, 300, 10_000])
def test_torn_or_damaged_event_file_is_cut_and_gets_again_what_it_lacks(tmp_path: Path, cut: int) -> None:
    report(tmp_path, range(10, 61, 10))
    upload(tmp_path)
    file = event_file(tmp_path)
    os.truncate(file, max(5, file.stat().st_size - cut))
    report(tmp_path, range(70, 71), last_step=60)
    upload(tmp_path)
    assert {name: number for name, number in held(tmp_path).items() if name in EXPECTED} == EXPECTED
    assert held(tmp_path)["loss", 70] == 1


def test_removed_event_file_is_made_again_with_all_points(tmp_path: Path) -> None:
    report(tmp_path, range(10, 61, 10))
    upload(tmp_path)
    event_file(tmp_path).unlink()
    report(tmp_path, range(70, 71), last_step=60)
    upload(tmp_path)
    assert held(tmp_path)["loss", 10] == held(tmp_path)["loss", 70] == 1


def test_full_disk_in_the_middle_of_a_record_doubles_and_loses_nothing(tmp_path: Path) -> None:
    report(tmp_path, range(10, 61, 10))

    class Full(TensorBoardSink):
        """Writes a part of its fourth batch, and fails."""

        batches = 0

        def _write(self, events):
            super()._write(events)
            self.batches += 1
            if self.batches == 4:
                os.truncate(self._file, self._file.stat().st_size - 20)
                raise OSError("no space left")

    upload_to(Full(str(tmp_path / "tensorboard"), tmp_path), tmp_path)
    assert held(tmp_path) == EXPECTED


def test_file_that_is_no_image_is_passed_over(tmp_path: Path) -> None:
    report(tmp_path, range(10, 61, 10))
    (tmp_path / "grid.png").write_text("no image")
    upload(tmp_path)
    assert held(tmp_path) == EXPECTED - Counter([("samples", 60)])
