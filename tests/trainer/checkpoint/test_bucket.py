"""Checkpoints in a bucket: saved, found, verified and resumed as those in a folder."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from s3fs import S3FileSystem

from data.storage import remote as patience
from data.storage.location import DataError
from data.storage.writable import WritableStorage
from tests.data.buckets import bucket
from tests.trainer.checkpoint.saved import write
from tests.trainer.runs import Stopper, assert_same_state, configure, state_of, train
from trainer.checkpoint.bucket import RemoteStorage
from trainer.checkpoint.format import CheckpointError, UnreadableError
from trainer.checkpoint.lease import LeaseError, acquire
from trainer.checkpoint.lease_places import BucketLease, claim_folder
from trainer.checkpoint.retention import Retention, prune
from trainer.checkpoint.storage import find_checkpoint, newest_fetched, newest_seen
from trainer.engine.ranks import Ranks
from trainer.rank.run_checkpoints import RunCheckpoints

URL = "s3://training/runs/mine"
T = TypeVar("T")


@pytest.fixture
def s3(monkeypatch, tmp_path) -> Iterator[S3FileSystem]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    with bucket("training", monkeypatch) as filesystem:
        yield filesystem


@pytest.fixture
def ranks():
    joined = Ranks.join("cpu", 60)
    yield joined
    joined.leave()


@pytest.mark.slow
def test_newest_valid_wins_and_damage_is_named(s3, ranks, caplog, tmp_path):
    storage = RemoteStorage(URL)
    assert newest_fetched(storage) is None
    for step in (1, 2, 3, 4):
        write(storage, ranks, step)
    part = f"{URL[5:]}/step-{{:08d}}/rank-00000.safetensors"
    content = bytearray(s3.cat_file(part.format(3)))
    content[-1] ^= 1
    s3.pipe_file(part.format(3), bytes(content))
    s3.rm_file(part.format(4))
    found = newest_fetched(storage)
    assert found
    assert found.step == 2
    assert found.section("generator").read("parameter", "layer.weight", 2, 5).tolist() == [2, 3, 4]
    assert "step-00000004/rank-00000.safetensors is missing" in caplog.text
    assert "step-00000003" in caplog.text and "its SHA-256 differs" in caplog.text
    seen = newest_seen(storage)
    assert seen and seen.step == 3  # without a download only sizes are compared
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 9; it has \[1, 2, 3, 4\]"):
        find_checkpoint(storage, 9)
    storage.forget()
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))


@pytest.mark.slow
def test_prune_keeps_what_the_rules_say_and_deletes_the_manifest_first(s3, ranks, monkeypatch):
    storage = RemoteStorage(URL)
    for step in (1, 2, 3):
        write(storage, ranks, step)
    s3.pipe_file(f"{URL[5:]}/step-00000002/leftover", b"x")
    removed: list[str] = []
    remove = WritableStorage.remove

    def noting(self: WritableStorage, names) -> None:
        names = list(names)
        removed.extend(names)
        remove(self, names)

    monkeypatch.setattr(WritableStorage, "remove", noting)
    prune(storage, Retention(keep_last=1), storage.list()[-1])
    assert [c.step for c in storage.list()] == [3]
    assert next(name for name in removed if name.startswith("step-00000002")) == "step-00000002/manifest.json"


@pytest.mark.slow
def test_storage_that_does_not_answer_is_never_taken_for_an_empty_one(s3, ranks, monkeypatch):
    write(RemoteStorage(URL), ranks, 1)
    monkeypatch.setattr(patience, "ATTEMPTS", 1)
    monkeypatch.setattr(RemoteStorage, "check_sizes", lambda *_: None)
    listed = RemoteStorage(URL).list()
    monkeypatch.setattr(RemoteStorage, "list", lambda _: listed)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be read: .*check AWS_ENDPOINT_URL"):
        newest_fetched(RemoteStorage(URL))


@pytest.mark.slow
def test_lease_in_a_bucket_keeps_a_second_run_out(s3):
    place = BucketLease(WritableStorage(URL))
    lease = acquire(place, "their launch")
    lease.check()
    seen = place.read()
    assert seen
    assert not place.swap(None, b"x")
    assert place.beat(seen, seen.replace(b'"beat": 0', b'"beat": 1'))
    assert not place.beat(seen, seen)
    taken = claim_folder(URL, "their launch")  # the same launch, started again
    with pytest.raises(LeaseError, match="another run took it over"):
        lease.check()
    lease.release()
    taken.check()
    taken.release()
    assert place.read() is None


class OnAnotherHost(Ranks):
    """Rank 1 of two, which hears from rank 0 what that one has found."""

    def __init__(self, heard: Sequence[object]) -> None:
        super().__init__(1, 2, torch.device("cpu"), None)
        self._heard = list(heard)

    def broadcast(self, value: T) -> T:
        return self._heard.pop(0)  # pyright: ignore[reportReturnType]

    def gather(self, value: T) -> Sequence[T]:
        return [value]


def test_other_host_completes_what_a_killed_start_had_downloaded_and_reads_its_own_copy(tiny, s3, ranks, tmp_path):
    storage = RemoteStorage(URL, owner="run")
    write(storage, ranks, 7)
    (listed,) = storage.list()
    half = storage.place("step-00000007")
    half.mkdir(parents=True)
    half.parent.parent.chmod(0o700)
    (half / "rank-00000.safetensors").write_bytes(b"half")
    config = configure(tiny, tmp_path / "run", f"checkpoint.directory={URL}")
    found = RunCheckpoints(config, OnAnotherHost(["", ("step-00000007", listed.manifest)])).newest()
    assert found and found.path == half
    found.verify()
    assert found.section("generator").read("parameter", "layer.weight", 2, 5).tolist() == [2, 3, 4]


@pytest.mark.slow
def test_stopped_run_resumes_from_the_bucket_with_the_same_weights(tiny, s3, tmp_path):
    local, remote = tmp_path / "local", tmp_path / "remote"
    train(configure(tiny, local))
    config = configure(tiny, remote, f"checkpoint.directory={URL}", "checkpoint.save_interval_steps=3")
    outcome, _ = train(config, Stopper(4))
    assert outcome.checkpoint == f"{URL}/step-00000004"
    outcome, _ = train(config)
    assert outcome.finished
    s3.get(f"{URL[5:]}/", f"{remote}/checkpoints/", recursive=True)
    assert_same_state(state_of(remote, 10), state_of(local, 10))
    assert sorted(Path(name).name for name in s3.ls(URL[5:])) == ["step-00000009", "step-00000010"]
    assert not list((tmp_path / "scratch").rglob("*.safetensors"))


def test_checkpoint_moved_aside_is_whole_and_none_of_the_run_any_more(s3, ranks):
    storage = RemoteStorage(URL)
    for step in (1, 2):
        write(storage, ranks, step)
    storage.set_aside("step-00000002", "aside-then")
    assert list(storage.names()) == ["step-00000001"]
    moved = newest_fetched(RemoteStorage(f"{URL}/aside-then"))
    assert moved and moved.step == 2


def test_part_of_a_bucket_that_is_refused_is_no_reason_to_take_an_older_checkpoint(s3, ranks, monkeypatch):
    storage = RemoteStorage(URL)
    for step in (1, 2):
        write(storage, ranks, step)

    def refused(_: object, name: str, *__: object, **___: object) -> None:
        raise DataError(f"{name}: HTTP 403")

    monkeypatch.setattr(WritableStorage, "download", refused)
    with pytest.raises(UnreadableError, match="HTTP 403"):
        newest_fetched(storage)
