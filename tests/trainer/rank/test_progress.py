"""What a user sees of a run's progress, on a terminal and in a file."""

import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from trainer.config.command_line import start_logging
from trainer.rank.progress import ProgressBar, RunStatus

LOSSES = {"loss_d_real": 0.5, "loss_g": 1.25}


def status(images: int, images_per_s: float = 20.0) -> RunStatus:
    return RunStatus(step=images, images=images, total_images=6000, images_per_s=images_per_s, losses=LOSSES)


def lines_of(caplog, seen: list[tuple[float, RunStatus]]) -> list[str]:
    """What is logged of states that are shown at these seconds."""
    caplog.set_level(logging.INFO)
    now = [0.0]
    with ProgressBar(clock=lambda: now[0]) as bar:
        for seconds, state in seen:
            now[0] = seconds
            bar.show(state)
    return [record.message for record in caplog.records]


def test_a_file_gets_a_line_a_minute_however_often_there_is_news(caplog):
    lines = lines_of(caplog, [(tenths / 10, status(2 * tenths)) for tenths in range(2401)])  # 4 minutes
    assert [line.partition("  ")[0] for line in lines] == [f"{1200 * i} of 6000 images" for i in (1, 2, 3, 4)]
    assert lines[0] == "1200 of 6000 images  20 images/s  loss_d_real 0.500  loss_g 1.250  240 s left"


def test_the_end_is_told_once_however_short_the_run_was(caplog):
    lines = lines_of(caplog, [(1, status(3000)), (2, status(6000)), (2.5, status(6000)), (90, status(6000))])
    assert lines == ["6000 of 6000 images  20 images/s  loss_d_real 0.500  loss_g 1.250"]


def test_a_run_that_stands_still_does_not_repeat_itself_and_says_no_time_before_it_has_a_rate(caplog):
    lines = lines_of(caplog, [(60, status(10, 0.0)), (120, status(10, 0.0)), (180, status(20, 0.0))])
    assert [line.partition("  ")[0] for line in lines] == ["10 of 6000 images", "20 of 6000 images"]
    assert not any("left" in line for line in lines)


def test_a_pipe_gets_whole_lines_without_control_characters(monkeypatch):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        start_logging(0)
        with ProgressBar() as bar:
            bar.show(status(40))
            bar.show(status(6000))
    with os.fdopen(reading, "rb") as end:
        said = end.read()
    assert said.count(b"\n") == 1 and said.endswith(b"\n")
    assert b"6000 of 6000 images" in said
    assert b"\r" not in said and b"\x1b" not in said


def read_to_the_end(master: int) -> str:
    """What was written to a terminal until its last user closed it."""
    said = b""
    with suppress(OSError):  # EIO is its end
        while piece := os.read(master, 65536):
            said += piece
    return said.decode()


def test_a_terminal_gets_one_bar_and_log_lines_stand_above_it(monkeypatch):
    master, slave = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        start_logging(0)
        with ThreadPoolExecutor() as reader:  # a terminal holds little: the bar would wait for somebody to look
            reading = reader.submit(read_to_the_end, master)
            with ProgressBar() as bar:
                bar.show(status(1200))
                logging.getLogger("trainer").warning("a word in between")
                bar.show(status(2400))
            terminal.close()
            said = reading.result()
    os.close(master)
    assert "2400/6000" in said
    assert "of 6000 images" not in said, "lines are for files"
    (line,) = [line for line in said.split("\n") if "a word in between" in line]
    assert "/6000" not in line.rpartition("\x1b[2K")[2], "the bar is wiped before a line is written"
