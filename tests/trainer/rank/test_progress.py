"""What a user sees of a run's progress, on a terminal and in a log."""

import logging
import sys

from trainer.rank.progress import ProgressBar, RunStatus

LOSSES = {"loss_d_real": 0.5, "loss_g": 1.25}


def status(images: int) -> RunStatus:
    return RunStatus(step=images, images=images, total_images=100, images_per_s=20.0, losses=LOSSES)


def test_a_log_gets_a_bounded_number_of_lines_with_rate_losses_and_time_left(caplog):
    caplog.set_level(logging.INFO)
    with ProgressBar() as bar:
        for images in range(101):
            bar.show(status(images))
            bar.show(status(images))
    lines = [record.message for record in caplog.records]
    assert len(lines) == ProgressBar.NUM_LINES
    assert lines[9] == "50 of 100 images  20 images/s  loss_d_real 0.500  loss_g 1.250  2 s left"
    assert lines[-1].startswith("100 of 100 images")


def test_a_terminal_gets_one_bar(monkeypatch, capsys, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ProgressBar() as bar:
        bar.show(status(40))
    assert "40/100" in capsys.readouterr().err
    assert caplog.records == []
