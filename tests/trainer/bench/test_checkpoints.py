"""How long a checkpoint holds training: its saves and its clock."""

import pytest
import torch

from data.storage.errors import OperationError
from tests.trainer.bench.made_time import MadeTime
from trainer.bench import checkpoints
from trainer.bench.command import main


class MadeWriter:
    """Holds each save for 0.1 s and has it on the disk after 0.5 s, but for what `fails`."""

    def __init__(self, clock: MadeTime, fails: bool = False) -> None:
        self.clock, self.fails, self.step, self.num_bytes = clock, fails, 0, 0

    def __call__(self, *_: object) -> "MadeWriter":
        return self

    def reserve(self, num_bytes: int) -> None: ...
    def close(self) -> None: ...

    def save(self, step: int, parts: dict, *_: object) -> None:
        self.step = step
        self.num_bytes = sum(4 * torch.numel(f.tensors["parameter"]) for f in parts["generator"])
        self.clock.sleep(0.1)

    def finish(self) -> tuple[int | None, str]:
        self.clock.sleep(0.4)
        return (None, "no space") if self.fails and self.step else (self.step, "")


def test_step_is_held_for_the_copy_and_the_whole_is_what_the_disk_takes(tmp_path, monkeypatch):
    clock = MadeTime()
    writer = MadeWriter(clock)
    monkeypatch.setattr(checkpoints, "time", clock)
    monkeypatch.setattr(checkpoints, "CheckpointWriter", writer)
    found = checkpoints.time_checkpoints(tmp_path, 8_000_000, 3)
    assert found == {
        "synchronous_s": pytest.approx(0.5),
        "held_s": pytest.approx(0.1),
        "held_share": pytest.approx(0.2),
    }
    assert (writer.step, writer.num_bytes) == (3, 8_000_000)


def test_save_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CheckpointWriter", MadeWriter(MadeTime(), fails=True))
    with pytest.raises(OperationError, match="no space"):
        checkpoints.time_checkpoints(tmp_path, 4_000_000, 1)


def test_real_saves_leave_nothing_behind(tmp_path, capsys):
    assert main(["checkpoint", "--mb", "8", "--rounds", "1", "--out", str(tmp_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        *("synchronous_s", "held_s", "held_share")
    ]
    assert not list(tmp_path.iterdir())


def test_state_too_small_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["checkpoint", "--mb", "3"])
    assert stopped.value.code == 2
    assert "'3' is given, allowed is a whole number of 4 or more" in capsys.readouterr().err


def test_folder_that_does_not_exist_is_refused(capsys):
    assert main(["checkpoint", "--out", "no/folder"]) == 2
    assert "--out is no/folder, which is not a folder" in capsys.readouterr().err
