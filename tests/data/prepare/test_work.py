"""A preparation that stopped anywhere continues after its last finished shard, and ends with the same bytes."""

import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from rich.console import Console

import data.prepare.work
import data.sets.work_folder
from data.prepare.encode import PreparedForm
from data.prepare.job import Preparation, PrepareOptions
from data.prepare.journal import load_journal
from data.prepare.work import InterruptedPreparationError, Outcome, PreparationError, prepare
from data.processes.pool import WorkerError
from data.shards.index import load_index
from data.sources.find import open_source
from data.sources.source import BaseSource, Item, SourceError, fingerprint
from tests.data.versions import write_version_1

NUM_ITEMS = 45
BAD = {3, 17, 18, 30, 44}
"""Items that are no images."""


@dataclass(frozen=True, kw_only=True)
class CountingSource(BaseSource):
    """Images of one grey level each. It lists what is read, and raises an error in place of one read."""

    items: tuple[Item, ...] = tuple(Item(f"{n:02d}.png", 1, n % 3) for n in range(NUM_ITEMS))
    class_names: tuple[str, ...] | None = ("a", "b", "c")
    description: str = "counting"
    stop_at: int = -1
    error: type[BaseException] = KeyboardInterrupt
    reads: list[int] = field(default_factory=list)

    def read(self, item: Item) -> bytes:
        number = int(item.name[:2])
        if len(self.reads) == self.stop_at:
            raise self.error("stopped")
        self.reads.append(number)
        if number in BAD:
            return b"text"
        stream = io.BytesIO()
        Image.new("L", (8, 8), number).save(stream, "PNG")
        return stream.getvalue()


def job(
    target: Path,
    source: CountingSource | None = None,
    *,
    seed: int = 0,
    shard_samples: int = 7,
    max_bad_percent: float = 100.0,
) -> Preparation:
    source = source or CountingSource()
    options = PrepareOptions(
        form=PreparedForm(size=8, channels=1, upscale=False),
        shard_samples=shard_samples,
        shard_mb=None,
        seed=seed,
        max_bad_percent=max_bad_percent,
        workers=0,
    )
    return Preparation(source=source, fingerprint=fingerprint(source), options=options, target=target)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), soft_wrap=True)


def notes(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def chunks_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an error within the source stops the preparation at exactly that image."""
    monkeypatch.setattr(data.prepare.work, "_CHUNK_ITEMS", 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stop(target: Path, console: Console, at: int, error: type[BaseException] = KeyboardInterrupt) -> Path:
    """Prepare until a read fails; gives the hidden folder."""
    with pytest.raises((InterruptedPreparationError, error)):
        prepare(job(target, CountingSource(stop_at=at, error=error)), console)
    return target.parent / f".{target.name}.unfinished"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The result of a preparation that nothing stopped: shards of 7, 7, 7, 7, 7 and 5 images."""
    target = tmp_path_factory.mktemp("unbroken") / "set"
    outcome = prepare(job(target), Console(file=io.StringIO()))
    assert [shard.num_samples for shard in outcome.index.shards] == [7, 7, 7, 7, 7, 5]
    return target, outcome


@pytest.mark.usefixtures("chunks_of_one")
@pytest.mark.parametrize("stops", [(0,), (5,), (12,), (10, 10, 10), (20, 1, 0, 3), (44,)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=["interrupt", "crash"])
def test_stopped_preparation_continues_and_gives_the_same_bytes(
    tmp_path: Path,
    console: Console,
    unbroken: tuple[Path, Outcome],
    stops: tuple[int, ...],
    error: type[BaseException],
) -> None:
    for at in stops:
        stop(tmp_path / "set", console, at, error)
    source = CountingSource()
    outcome = prepare(job(tmp_path / "set", source), console)
    assert contents(tmp_path / "set") == contents(unbroken[0])
    assert outcome.bad == unbroken[1].bad
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


@pytest.mark.usefixtures("chunks_of_one")
def test_images_of_finished_shards_are_not_read_again(tmp_path: Path, console: Console) -> None:
    whole = CountingSource()
    prepare(job(tmp_path / "whole", whole), console)
    work = stop(tmp_path / "set", console, at=35)
    journal = load_journal(work / "journal.json")
    assert journal is not None
    assert len(journal.finished) >= 3
    before = {file.name: file.stat() for file in (work / "set").iterdir()}
    source = CountingSource()
    prepare(job(tmp_path / "set", source), console)
    assert source.reads == whole.reads[journal.num_items :]
    for shard in journal.shards:
        after = (tmp_path / "set" / shard.name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before[shard.name].st_ino, before[shard.name].st_mtime_ns)
    assert f"continuing after {len(journal.finished)} finished shards, {journal.num_items} of 45 images" in notes(
        console
    )


@pytest.mark.usefixtures("chunks_of_one")
def test_interrupted_preparation_says_what_is_kept(tmp_path: Path, console: Console) -> None:
    with pytest.raises(InterruptedPreparationError) as caught:
        prepare(job(tmp_path / "set", CountingSource(stop_at=20)), console)
    assert str(caught.value) == (
        f"interrupted; 2 finished shards are kept in {tmp_path}/.set.unfinished: the same command continues after them"
    )
    with pytest.raises(InterruptedPreparationError, match="nothing is left behind, run the same command again"):
        prepare(job(tmp_path / "other", CountingSource(stop_at=5)), console)
    assert [file.name for file in tmp_path.iterdir()] == [".set.unfinished"]


def damage_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.usefixtures("chunks_of_one")
@pytest.mark.parametrize("name", ["00001.tar", "00001.offsets"])
@pytest.mark.parametrize("damage", [damage_byte, truncate, Path.unlink])
def test_damaged_finished_shard_is_made_again(
    tmp_path: Path, console: Console, unbroken: tuple[Path, Outcome], damage: object, name: str
) -> None:
    assert callable(damage)
    work = stop(tmp_path / "set", console, at=40)
    journal = load_journal(work / "journal.json")
    assert journal is not None
    assert len(journal.finished) >= 4
    damage(work / "set" / name)
    source = CountingSource()
    outcome = prepare(job(tmp_path / "set", source), console)
    told = f"{work}/set/{name} is damaged; shard 00001.tar and those after it are prepared again"
    assert told in notes(console)
    assert len(source.reads) == NUM_ITEMS - journal.finished[0].num_items
    assert contents(tmp_path / "set") == contents(unbroken[0])
    assert outcome.bad == unbroken[1].bad


@pytest.mark.usefixtures("chunks_of_one")
@pytest.mark.parametrize("offsets", [None, b"", b"half of them"])
def test_shard_that_was_finished_but_not_entered_is_made_again(
    tmp_path: Path, console: Console, unbroken: tuple[Path, Outcome], offsets: bytes | None
) -> None:
    work = stop(tmp_path / "set", console, at=20)
    (work / "set" / "00002.tar").write_bytes((unbroken[0] / "00002.tar").read_bytes())
    if offsets is not None:
        (work / "set" / "00002.offsets").write_bytes(offsets)
    prepare(job(tmp_path / "set"), console)
    assert notes(console).startswith("data.prepare: continuing after 2 finished shards, ")
    assert contents(tmp_path / "set") == contents(unbroken[0])


@pytest.mark.usefixtures("chunks_of_one")
def test_work_of_another_job_is_discarded_with_a_word(
    tmp_path: Path, console: Console, unbroken: tuple[Path, Outcome]
) -> None:
    target = tmp_path / "set"
    with pytest.raises(InterruptedPreparationError):
        prepare(job(target, CountingSource(stop_at=30), seed=3, shard_samples=5), console)
    source = CountingSource()
    prepare(job(target, source), console)
    assert len(source.reads) == NUM_ITEMS
    told = f"other unfinished work in {tmp_path}/.set.unfinished is discarded"
    assert notes(console) == f"data.prepare: {told} (seed is 3 there, 0 here, shard_samples is 5 there, 7 here)\n"
    assert contents(target) == contents(unbroken[0])


@pytest.mark.usefixtures("chunks_of_one")
def test_work_of_version_1_is_discarded_with_a_word(
    tmp_path: Path, console: Console, unbroken: tuple[Path, Outcome]
) -> None:
    work = stop(tmp_path / "set", console, at=30)
    journal = json.loads((work / "journal.json").read_text())
    del journal["job"]["format_version"]
    for entry in journal["finished"]:
        del entry["shard"]["offsets"]
    (work / "journal.json").write_text(json.dumps(journal))
    for file in (work / "set").glob("*.offsets"):
        file.unlink()
    prepare(job(tmp_path / "set"), console)
    assert "is discarded (format_version is None there, 2 here)" in notes(console)
    assert contents(tmp_path / "set") == contents(unbroken[0])


def test_data_set_of_version_1_counts_as_there(
    tmp_path: Path, console: Console, unbroken: tuple[Path, Outcome]
) -> None:
    index = write_version_1(load_index(unbroken[0]), tmp_path / "set")
    before = contents(tmp_path / "set")
    outcome = prepare(job(tmp_path / "set"), console)
    assert (outcome.was_there, outcome.index) == (True, index)
    assert contents(tmp_path / "set") == before


@pytest.mark.usefixtures("chunks_of_one")
def test_work_of_another_encoder_is_discarded(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setattr(PIL, "__version__", "1.2.3")
        stop(tmp_path / "set", console, at=30)
    prepare(job(tmp_path / "set"), console)
    assert f"is discarded (pillow is 1.2.3 there, {PIL.__version__} here)" in notes(console)


@pytest.mark.usefixtures("chunks_of_one")
@pytest.mark.parametrize("content", [b"", b'{"format": ', b"[]", b'{"format": "other"}'])
def test_unreadable_journal_counts_as_none(
    tmp_path: Path, console: Console, unbroken: tuple[Path, Outcome], content: bytes
) -> None:
    work = stop(tmp_path / "set", console, at=30)
    (work / "journal.json").write_bytes(content)
    source = CountingSource()
    prepare(job(tmp_path / "set", source), console)
    assert len(source.reads) == NUM_ITEMS
    assert contents(tmp_path / "set") == contents(unbroken[0])


@pytest.mark.usefixtures("chunks_of_one")
def test_bad_images_before_the_stop_count(tmp_path: Path, console: Console) -> None:
    work = stop(tmp_path / "set", console, at=40)
    journal = load_journal(work / "journal.json")
    assert journal is not None
    assert 0 < len(journal.bad) < len(BAD)
    with pytest.raises(PreparationError, match=r"5 of 45 images are unusable, --max-bad 10 allows 4"):
        prepare(job(tmp_path / "set", max_bad_percent=10), console)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("chunks_of_one")
def test_lower_limit_than_before_the_stop_fails_at_once(tmp_path: Path, console: Console) -> None:
    stop(tmp_path / "set", console, at=40)
    source = CountingSource()
    with pytest.raises(PreparationError, match=r"of 45 images are unusable, --max-bad 0 allows 0"):
        prepare(job(tmp_path / "set", source, max_bad_percent=0), console)
    assert source.reads == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("chunks_of_one")
def test_source_that_turns_out_bad_leaves_nothing(tmp_path: Path, console: Console) -> None:
    stop(tmp_path / "set", console, at=30, error=SourceError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("chunks_of_one")
def test_killed_worker_leaves_the_finished_shards(tmp_path: Path, console: Console) -> None:
    with pytest.raises(PreparationError, match=r"stopped; 4 finished shards are kept in .*/\.set\.unfinished"):
        prepare(job(tmp_path / "set", CountingSource(stop_at=35, error=WorkerError)), console)


def test_journal_does_not_grow_with_the_images(tmp_path: Path, console: Console) -> None:
    def size_of_journal(num_items: int) -> int:
        items = tuple(Item(f"{n % 2:02d}-{n}.png", 1, 0) for n in range(num_items))
        target = tmp_path / str(num_items)
        source = CountingSource(items=items, stop_at=num_items - 1)
        with pytest.raises(InterruptedPreparationError):
            prepare(job(target, source, shard_samples=num_items * 9 // 20), console)
        return (tmp_path / f".{num_items}.unfinished" / "journal.json").stat().st_size

    assert abs(size_of_journal(100) - size_of_journal(2000)) < 20


def test_remains_of_a_command_killed_after_it_had_published_are_removed(tmp_path: Path, console: Console) -> None:
    prepare(job(tmp_path / "set"), console)
    work = tmp_path / ".set.unfinished"
    work.mkdir()
    (work / "lock").write_text("process 1 on a host")
    (work / "journal.json").write_text("{}")
    assert prepare(job(tmp_path / "set"), console).was_there
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


@pytest.mark.usefixtures("chunks_of_one")
def test_interrupt_after_the_last_moment_says_that_it_is_finished(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data.sets.work_folder, "sync_folder", interrupt)
    with pytest.raises(InterruptedPreparationError, match=f"interrupted; {tmp_path}/set was just finished"):
        prepare(job(tmp_path / "set"), console)
    assert [file.name for file in tmp_path.iterdir()] == ["set"]
    assert prepare(job(tmp_path / "set"), console).was_there


def test_result_that_another_process_published_meanwhile_is_found(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(job(tmp_path / "set"), console)
    answers = [None, first.index]
    monkeypatch.setattr(data.prepare.work, "find_prepared", lambda _: answers.pop(0))
    source = CountingSource()
    assert prepare(job(tmp_path / "set", source), console) == Outcome(index=first.index, bad=[], was_there=True)
    assert source.reads == []
    assert [file.name for file in tmp_path.iterdir()] == ["set"]


@pytest.mark.slow
def test_limit_of_bad_images_is_exact(tmp_path: Path, console: Console) -> None:
    # 57, but in floating point 10,000 * 0.57 / 100 is less.
    items = tuple(Item(f"03-{n}.png" if n < 57 else f"00-{n}.png", 1, 0) for n in range(10_000))
    whole = job(tmp_path / "set", CountingSource(items=items), max_bad_percent=0.57, shard_samples=len(items))
    assert len(prepare(whole, console).bad) == 57


def test_file_names_that_are_no_text_are_told_all_the_same(tmp_path: Path, console: Console) -> None:
    (tmp_path / "source").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "source" / "good.png")
    with open(os.fsencode(tmp_path / "source") + b"/\x1b[31m\ncaf\xe9.png", "wb") as file:
        file.write(b"text")
    source = open_source(str(tmp_path / "source"))
    whole = job(tmp_path / "set")
    outcome = prepare(
        Preparation(source=source, fingerprint=fingerprint(source), options=whole.options, target=whole.target), console
    )
    assert outcome.bad == ["\\x1b[31m\\ncaf\\udce9.png is no image of a known format"]
