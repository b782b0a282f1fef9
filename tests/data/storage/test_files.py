"""A file appears as a whole or not at all, and is on the disk where that is asked for."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from data.storage.errors import UserError
from data.storage.files import check_writable, read_note, replaced, sha256_of, timestamp, write_json
from tests.data.storage.full_disk import small_files


def test_file_is_replaced_at_the_end_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    with replaced(file) as draft:
        draft.write_text("after")
        assert draft.parent == tmp_path
        assert file.read_text() == "before"
    assert file.read_text() == "after"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_failure_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, durable: bool, error: type[BaseException]
) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(error), replaced(file, durable=durable) as draft:
        draft.write_text("half")
        raise error
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def test_file_that_cannot_be_put_in_place_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(OSError), replaced(tmp_path / "file") as draft:
        draft.write_text("new")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("inside", ["", "weights"])
def test_a_write_that_fails_names_the_file_and_not_its_draft(tmp_path: Path, inside: str) -> None:
    with pytest.raises(OSError, match="too large") as raised, small_files(1000), replaced(tmp_path / "a") as draft:
        if inside:
            draft.mkdir()
        with (draft / inside).open("wb", buffering=0) as file:
            assert file.write(bytes(1000)) == 1000
            file.write(bytes(1))
    assert raised.value.filename == str(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_errors_about_other_files_and_without_a_number_stay_as_they_are(tmp_path: Path) -> None:
    for other, words in ((OSError("no answer"), "no answer"), (OSError(errno.ENOENT, "Gone", "/b"), "Gone: '/b'")):
        with pytest.raises(OSError, match=words), replaced(tmp_path / "a"):
            raise other
    with pytest.raises(IsADirectoryError) as raised, replaced(tmp_path / "a") as draft:
        draft.mkdir()
        draft.write_text("x")
    assert raised.value.filename == str(tmp_path / "a")


def test_what_cannot_be_made_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    check_writable(tmp_path / "new/folder/a.png")
    check_writable(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write .*/file/a\.png: .*/file is no folder"):
        check_writable(tmp_path / "file/a.png")
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)  # root may write everywhere
    with pytest.raises(UserError, match=f"cannot write .*a.png: the folder {tmp_path} cannot be written"):
        check_writable(tmp_path / "new/a.png")


def test_folder_appears_as_a_whole_and_is_removed_as_a_whole(tmp_path: Path) -> None:
    with replaced(tmp_path / "folder") as draft:
        draft.mkdir()
        (draft / "a").write_text("a")
    assert (tmp_path / "folder" / "a").read_text() == "a"
    with pytest.raises(KeyError), replaced(tmp_path / "other") as draft:
        draft.mkdir()
        (draft / "a").write_text("a")
        raise KeyError
    assert os.listdir(tmp_path) == ["folder"]


def test_durable_content_is_on_the_disk_before_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with replaced(tmp_path / "file", durable=True, draft="draft") as draft:
        draft.write_text("x")
    assert calls == ["sync draft", "rename", f"sync {tmp_path.name}"]
    calls.clear()
    with replaced(tmp_path / "file") as draft:
        draft.write_text("x")
    assert calls == ["rename"]


def test_remains_of_a_killed_process_are_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "draft").write_text("half")
    with (tmp_path / "draft").open("a") as late, replaced(tmp_path / "file", draft="draft") as draft:
        draft.write_text("whole")
        late.write("more")
        late.flush()
    assert (tmp_path / "file").read_text() == "whole"


def test_json_ends_with_a_newline_and_keeps_letters(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Größe"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "name": "Größe"\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_hash_is_of_the_whole_file_by_path_or_descriptor(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    expected = hashlib.sha256(b"content").hexdigest()
    assert sha256_of(file) == expected
    with file.open("rb") as stream:
        assert sha256_of(stream.fileno()) == expected
        assert os.pread(stream.fileno(), 7, 0) == b"content"


def test_time_is_in_utc_to_the_second() -> None:
    assert len(timestamp()) == len("2026-01-31T12:00:00Z")
    assert timestamp().endswith("Z")


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"[]", b'{"step": "x"}', b"5", b"[" * 100_000])
def test_damaged_note_is_named_once_and_set_aside(tmp_path, caplog, content):
    note = tmp_path / "note.json"
    note.write_bytes(content)
    for _ in range(2):
        assert read_note(note, lambda read: int(json.loads(read)["step"])) is None
    assert caplog.text.count(f"{note} is damaged") == 1
    (aside,) = tmp_path.iterdir()
    assert aside.name.startswith("note.json.bad-") and aside.read_bytes() == content


def test_note_that_is_a_folder_is_set_aside_and_a_missing_one_is_no_news(tmp_path, caplog):
    assert read_note(tmp_path / "none", bytes.decode) is None
    assert not caplog.text
    (tmp_path / "folder").mkdir()
    assert read_note(tmp_path / "folder", bytes.decode) is None
    assert not (tmp_path / "folder").exists()
