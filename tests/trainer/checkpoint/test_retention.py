"""Which checkpoints stay, and that deleting never comes before the new one is safe."""

import errno
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.checkpoint.saved import write
from trainer.checkpoint.format import CheckpointError, list_checkpoints, newest_valid
from trainer.checkpoint.retention import Retention, Saved, kept_steps, prune
from trainer.checkpoint.storage import FolderStorage
from trainer.engine.ranks import Ranks


@pytest.fixture
def ranks():
    joined = Ranks.join("cpu", 60)
    yield joined
    joined.leave()


def history(*values: float | None) -> list[Saved]:
    """A checkpoint every 10 steps of 16 images."""
    return [Saved(10 * i, 160 * i, value) for i, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (Retention(keep_last=1), {60}),
        (Retention(keep_last=3), {40, 50, 60}),
        (Retention(keep_last=9), {10, 20, 30, 40, 50, 60}),
        (Retention(keep_last=1, keep_every_images=320), {20, 40, 60}),
        (Retention(keep_last=1, keep_every_images=400), {30, 50, 60}),
        (Retention(keep_last=1, keep_every_images=10_000), {60}),
        (Retention(keep_last=1, keep_best="fid"), {40, 60}),  # 4.0 twice: the newer one
        (Retention(keep_last=1, keep_best="fid", keep_best_mode="max"), {10, 60}),
    ],
)
def test_rules_keep(rules, kept):
    assert kept_steps(history(9.0, 4.0, None, 4.0, 5.0, 6.0), rules) == kept


@given(
    st.lists(st.one_of(st.none(), st.floats(-9, 9)), min_size=1, max_size=20),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(1, 2000)),
    st.sampled_from(["min", "max"]),
)
def test_pruning_as_one_goes_keeps_what_pruning_at_the_end_keeps_and_always_the_newest(values, last, every, mode):
    rules = Retention(keep_last=last, keep_every_images=every, keep_best="m", keep_best_mode=mode)
    alive: list[Saved] = []
    for saved in history(*values):
        alive.append(saved)
        kept = kept_steps(alive, rules)
        assert saved.step in kept
        alive = [s for s in alive if s.step in kept]
    assert {s.step for s in alive} == kept_steps(history(*values), rules)


def steps(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("step-").lstrip("0") for path in folder.iterdir())


def prune_to(folder: Path, step: int, **rules) -> None:
    newest = next(c for c in list_checkpoints(folder) if c.step == step)
    prune(FolderStorage(folder), Retention(**rules), newest)


def test_prune_never_counts_what_lies_beyond_the_checkpoint_just_written(tmp_path, ranks):
    for step in (100, 150, 200, 300):
        write(tmp_path, ranks, step)
    (tmp_path / "step-00000120").mkdir()  # a save that was killed
    prune_to(tmp_path, 150, keep_last=1)  # the run resumed from 100
    assert steps(tmp_path) == ["150", "200", "300"]


def test_prune_removes_files_that_a_larger_group_left_in_the_folder(tmp_path, ranks):
    path = write(tmp_path, ranks, 1)
    (path / "rank-00003.safetensors").write_bytes(b"of a save that was killed")
    prune_to(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "rank-00000.safetensors"]


@pytest.mark.parametrize("damage", ["part is gone", "part is cut", "manifest is gone", "manifest is another"])
def test_nothing_is_deleted_unless_the_new_checkpoint_is_there(tmp_path, ranks, damage):
    write(tmp_path, ranks, 1)
    path = write(tmp_path, ranks, 2)
    newest = list_checkpoints(tmp_path)[1]
    part, manifest = path / "rank-00000.safetensors", path / "manifest.json"
    if damage == "part is gone":
        part.unlink()
    elif damage == "part is cut":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "manifest is gone":
        manifest.unlink()
    else:
        manifest.write_text(json.dumps({**newest.manifest, "images": 7}))
    with pytest.raises(CheckpointError, match=r"nothing is deleted|is missing|has .* bytes"):
        prune(FolderStorage(tmp_path), Retention(keep_last=1), newest)
    assert steps(tmp_path) == ["1", "2"]
    found = newest_valid(tmp_path)
    assert found


def test_checkpoint_whose_manifest_cannot_be_read_just_now_is_not_deleted(tmp_path, ranks, monkeypatch):
    for step in (1, 2, 3):
        write(tmp_path, ranks, step)

    def stale(path: Path) -> bytes:
        if path == tmp_path / "step-00000001" / "manifest.json":
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path)

    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        prune_to(tmp_path, 3, keep_last=9)
    monkeypatch.undo()
    assert [c.step for c in list_checkpoints(tmp_path)] == [1, 2, 3]


def test_disk_that_fails_while_deleting_leaves_the_newest(tmp_path, ranks, monkeypatch):
    for step in (1, 2, 3):
        write(tmp_path, ranks, step)

    def broken(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("trainer.checkpoint.storage.shutil.rmtree", broken)
    with pytest.raises(OSError, match="Input/output"):
        prune_to(tmp_path, 3, keep_last=1)
    found = newest_valid(tmp_path)
    assert found
    assert found.step == 3


def test_checkpoint_that_is_a_link_stays_and_does_not_keep_the_others(tmp_path, ranks):
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        write(folder, ranks, step)
    (folder / "step-00000001").rename(tmp_path / "elsewhere")
    (folder / "step-00000001").symlink_to(tmp_path / "elsewhere")
    *_, newest = list_checkpoints(folder)
    with pytest.raises(OSError, match="step-00000001 is no folder of a checkpoint"):
        prune(FolderStorage(folder), Retention(keep_last=1), newest)
    assert [checkpoint.step for checkpoint in list_checkpoints(folder)] == [1, 4]


def test_metric_that_no_checkpoint_has_is_named_with_those_it_has(tmp_path, ranks, caplog):
    write(tmp_path, ranks, 1, {"metrics": {"loss_g": 1.0}})
    prune_to(tmp_path, 1, keep_best="fit")
    assert "checkpoint.keep_best is fit, which no checkpoint has: its manifest has loss_g" in caplog.text
