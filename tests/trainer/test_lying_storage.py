"""Whatever call of a save or of a load fails or lies: an older valid checkpoint, or a refusal."""

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.storage.lying import Lying, PowerCut
from tests.trainer.checkpoint import saved
from tests.trainer.checkpoint.saved import fragments
from trainer.checkpoint.format import FORMAT_VERSION, CheckpointError, checkpoint_name, rank_file
from trainer.checkpoint.part import HostMemory
from trainer.checkpoint.retention import Retention, prune
from trainer.checkpoint.storage import FolderStorage, newest_fetched
from trainer.checkpoint.writer import CheckpointWriter, commit_parts
from trainer.engine.ranks import Ranks

ERRORS = [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EACCES]
FAULTS = [*ERRORS, ("from", errno.EIO), "short", "torn", "cut", "undone"]


def save(folder: Path, step: int, keep_last: int = 1) -> None:
    storage = FolderStorage(folder)
    memory = [HostMemory(torch.device("cpu")) for _ in range(2)]
    parts = {
        rank_file(rank): memory[rank].take({"generator": fragments(5 * rank, 5 * rank + 5, step)}, {})
        for rank in range(2)
    }
    manifest = {"format_version": FORMAT_VERSION, "step": step, "world_size": 2, "config": {}, "images": step}
    commit_parts(storage, checkpoint_name(step), parts, manifest)
    own = next(checkpoint for checkpoint in storage.list() if checkpoint.step == step)
    prune(storage, Retention(keep_last=keep_last), own)


def newest(folder: Path) -> int:
    found = newest_fetched(FolderStorage(folder))
    assert found
    read = found.section("generator").read("parameter", "layer.weight", 0, 10)
    assert torch.equal(read, found.step * torch.arange(10.0))
    return found.step


def try_each(start: Path, folder: Path, fault: Any, action: Callable[[Path], object]) -> dict[int, int]:
    """Do it with the fault at each call in turn; newest step afterwards, when storage tells the truth, by call."""
    after: dict[int, int] = {}
    at = 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        with pytest.MonkeyPatch.context() as patch:
            lying = Lying(folder, patch, fault, at)
            with suppress(OSError, CheckpointError, StopIteration, PowerCut):
                action(folder)
        after[at] = newest(folder)
        if not lying.happened:
            return after
        at += 1


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    save(folder, 1)
    return folder


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_save_during_which_storage_lies_leaves_a_valid_checkpoint(start, tmp_path, fault):
    after = try_each(start, tmp_path / "run", fault, lambda folder: save(folder, 2))
    assert len(after) > 40
    assert set(after.values()) == ({2} if fault == "short" else {1, 2})


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_load_during_which_storage_lies_ends_with_the_newest_or_a_refusal(start, tmp_path, fault):
    taken: list[int] = []
    two = tmp_path / "two"
    shutil.copytree(start, two)
    save(two, 2, keep_last=2)
    after = try_each(two, tmp_path / "run", fault, lambda folder: taken.append(newest(folder)))
    assert len(after) > 5
    assert set(after.values()) == {2}, "a load changes nothing"
    assert set(taken) == {2}, "an older one never takes the place of one that cannot be read"


@pytest.fixture
def save_by_writer(monkeypatch) -> Iterator[Callable[..., None]]:
    """Saves as a run does, with its retries, in this thread."""
    monkeypatch.setattr(CheckpointWriter, "_start", lambda self, action: action())
    ranks = Ranks.join("cpu", 60)

    def save_by_writer(folder: Path, step: int, **more: Any) -> None:
        to = saved.writer(folder, ranks, retention=Retention(keep_last=1), **more)
        to.save(step, {"generator": fragments(scale=step)}, {}, {"config": {}, "images": step})
        to.close()

    yield save_by_writer
    ranks.leave()


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_save_of_a_run_survives_one_error_and_leaves_a_valid_checkpoint_after_others(
    start, tmp_path, save_by_writer, fault
):
    after = try_each(start, tmp_path / "run", fault, lambda folder: save_by_writer(folder, 2))
    assert len(after) > 30
    assert set(after.values()) == ({2} if fault in (*ERRORS, "short", "torn") else {1, 2})


def test_a_checkpoint_that_was_reported_survives_a_power_cut(start, tmp_path, save_by_writer):
    folder = tmp_path / "run"
    shutil.copytree(start, folder)
    reported: list[int] = []

    def report(step: int) -> None:
        reported.append(step)
        lying.cut()  # before older ones are deleted

    with pytest.MonkeyPatch.context() as patch, suppress(PowerCut):
        lying = Lying(folder, patch, "undone")
        save_by_writer(folder, 2, on_commit=report)
    assert reported == [2] and newest(folder) == 2
