"""The hidden folder is held by one process, holds nothing of others, and goes away as a whole."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from data.sets.work_folder import OutputError, WorkFolder, remove_emptied


def everything(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))


def test_result_takes_the_name_of_the_target_and_nothing_else_is_left(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "deep" / "set") as work:
        (work.result / "00000.tar").write_text("a")
        work.journal.write_text("{}")
        work.publish()
    assert everything(tmp_path) == ["deep", "deep/set", "deep/set/00000.tar"]


def test_removed_folder_takes_the_parents_with_it_that_it_made(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with WorkFolder(tmp_path / "mine" / "deep" / "er" / "set") as work:
        (work.result / "00000.tar").write_text("a")
        work.journal.write_text("{}")
        work.remove()
    assert everything(tmp_path) == ["mine"]


def test_folder_stays_as_it_is_unless_it_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), WorkFolder(tmp_path / "set") as work:
        (work.result / "00000.tar").write_text("a")
        raise KeyboardInterrupt
    with WorkFolder(tmp_path / "set") as work:
        assert (work.result / "00000.tar").read_text() == "a"


def test_second_process_is_told_who_is_at_work(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "set"), pytest.raises(OutputError) as caught, WorkFolder(tmp_path / "set"):
        pass
    assert f"--out {tmp_path / 'set'} is being prepared by process {os.getpid()} on " in str(caught.value)
    with WorkFolder(tmp_path / "set"):
        pass


def test_lock_of_a_folder_that_was_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes between the opening of the lock file and the locking."""
    calls: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        if not calls:
            shutil.rmtree(tmp_path / ".set.unfinished")
        calls.append(descriptor)
        real(descriptor, operation)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    with WorkFolder(tmp_path / "set") as work:
        assert len(calls) == 2
        assert everything(work.path) == ["lock", "set"]
        with pytest.raises(OutputError, match="is being prepared by"), WorkFolder(tmp_path / "set"):
            pass


def test_file_system_without_locks_is_worked_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with WorkFolder(tmp_path / "set") as work:
        work.publish()
    assert everything(tmp_path) == ["set"]


@pytest.mark.parametrize("name", ["thesis.txt", "set/notes.tar", "set/deep/00000.tar", "00000.tar"])
def test_files_of_others_are_refused_and_kept(tmp_path: Path, name: str) -> None:
    file = tmp_path / ".set.unfinished" / name
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    before = everything(tmp_path)
    with pytest.raises(OutputError, match=r"is in the way: it holds .*, which no preparation wrote"):
        WorkFolder(tmp_path / "set").__enter__()
    assert everything(tmp_path) == before


def test_linked_result_is_refused_and_what_it_leads_to_is_kept(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.txt").write_text("years of work")
    (tmp_path / ".set.unfinished").mkdir()
    (tmp_path / ".set.unfinished" / "set").symlink_to(tmp_path / "elsewhere")
    before = everything(tmp_path)
    with pytest.raises(OutputError, match=r"is in the way: it holds set, which no preparation wrote"):
        WorkFolder(tmp_path / "set").__enter__()
    assert everything(tmp_path) == before


def test_link_or_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".one.unfinished").symlink_to("elsewhere")
    (tmp_path / ".two.unfinished").write_text("mine")
    for name in ("one", "two"):
        with pytest.raises(OutputError, match=rf"{name}\.unfinished is in the way: it is no folder"):
            WorkFolder(tmp_path / name).__enter__()
    assert everything(tmp_path) == [".one.unfinished", ".two.unfinished", "elsewhere"]


def test_folder_that_cannot_be_made_leaves_no_parents(tmp_path: Path) -> None:
    # No name may be longer than 255 bytes, and the hidden one is longer than that of the target.
    with pytest.raises(OSError, match="name too long"):
        WorkFolder(tmp_path / "deep" / ("x" * 250)).__enter__()
    assert everything(tmp_path) == []


def test_remains_of_a_published_result_are_removed_and_unfinished_work_is_not(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "set") as work:
        work.journal.write_text("{}")
        work.result.rename(tmp_path / "set")
    remove_emptied(tmp_path / "set")
    assert everything(tmp_path) == ["set"]

    with WorkFolder(tmp_path / "set") as work:
        (work.result / "00000.tar").write_text("a")
    remove_emptied(tmp_path / "set")
    assert work.result.is_dir()
