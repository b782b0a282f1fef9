"""Copies to and from a URL are checked by hash, continue, and replace nothing else."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from data.prepare.command import main
from data.sets import transfer
from data.shards.files import fetch
from data.shards.index import DataFile, ShardIndex, load_index, verify_present
from data.storage import remote
from tests.data.buckets import bucket
from tests.data.servers import Fault, FaultyServer

Refusal = Callable[..., str]
NUM_FILES = 17
"""Eight shards with their offsets, and origin.json."""


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3FileSystem]:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    with bucket("sets", monkeypatch) as filesystem:
        yield filesystem


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_pushed_and_pulled_set_has_the_same_bytes_and_is_copied_once(
    s3: S3FileSystem, prepared: ShardIndex, tmp_path: Path, told: Callable[..., str]
) -> None:
    assert f"40 images in 8 shards; {NUM_FILES} files with" in told("push", prepared.directory, "s3://sets/a/b")
    assert load_index("s3://sets/a/b").digest == prepared.digest
    assert not s3.exists(f"sets/a/b/{transfer.MARK_NAME}")
    assert "nothing to do" in told("push", prepared.directory, "s3://sets/a/b")
    assert "nothing to do" in told("push", prepared.directory, "s3://sets/a/b", "--check", "size")
    assert f"{NUM_FILES} files with" in told("pull", "s3://sets/a/b", tmp_path / "new" / "set")
    assert contents(tmp_path / "new" / "set") == contents(prepared.directory)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["set"]
    assert "nothing to do" in told("pull", "s3://sets/a/b", tmp_path / "new" / "set")


def test_push_given_again_sends_what_is_missing_or_altered(
    s3: S3FileSystem, prepared: ShardIndex, told: Callable[..., str]
) -> None:
    told("push", prepared.directory, "s3://sets/c")
    altered = bytearray((prepared.directory / "00002.tar").read_bytes())
    altered[700] ^= 1
    s3.pipe_file("sets/c/00002.tar", bytes(altered))
    s3.rm_file("sets/c/00005.offsets")
    # Of the same size: only its content tells.
    assert "1 files with 60 bytes copied" in told("push", prepared.directory, "s3://sets/c", "--check", "size")
    assert f"1 files with {len(altered)} bytes copied" in told("push", prepared.directory, "s3://sets/c")
    assert s3.cat_file("sets/c/00002.tar") == (prepared.directory / "00002.tar").read_bytes()


def test_push_that_fails_leaves_no_data_set_and_continues(
    s3: S3FileSystem, own_copy: ShardIndex, told: Callable[..., str], refusal: Refusal
) -> None:
    shard = own_copy.directory / "00003.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"x")
    said = refusal("push", own_copy.directory, "s3://sets/d", code=1)
    assert f"shard 00003.tar: {shard} was altered: its SHA-256 is" in said
    assert not s3.exists("sets/d/index.json")
    assert not s3.exists("sets/d/00003.tar")
    shard.write_bytes(content)
    s3.pipe_file("sets/d/00004.tar", b"cut off")
    told("push", own_copy.directory, "s3://sets/d")
    assert load_index("s3://sets/d").digest == own_copy.digest
    assert s3.cat_file("sets/d/00004.tar") == (own_copy.directory / "00004.tar").read_bytes()


def test_what_else_is_at_the_url_stays(
    s3: S3FileSystem, prepared: ShardIndex, version_1: ShardIndex, told: Callable[..., str], refusal: Refusal
) -> None:
    s3.pipe_file("sets/other/notes.txt", b"mine")
    said = refusal("push", prepared.directory, "s3://sets/other")
    assert "s3://sets/other holds other files, such as notes.txt; choose another URL" in said
    assert s3.find("sets/other") == ["sets/other/notes.txt"]
    told("push", version_1.directory, "s3://sets/first")
    assert "holds another prepared data set" in refusal("push", prepared.directory, "s3://sets/first")
    s3.pipe_file(f"sets/begun/{transfer.MARK_NAME}", (version_1.directory / "index.json").read_bytes())
    assert "an unfinished copy of another data set" in refusal("push", prepared.directory, "s3://sets/begun")


def test_sizes_of_the_originals_go_along_and_change_no_digest(
    s3: S3FileSystem, own_copy: ShardIndex, tmp_path: Path, told: Callable[..., str]
) -> None:
    origin = own_copy.directory / "origin.json"
    content = origin.read_bytes()
    origin.unlink()
    told("push", own_copy.directory, "s3://sets/e")
    assert not s3.exists("sets/e/origin.json")
    told("pull", "s3://sets/e", tmp_path / "set")
    sheet = ("--sheet", tmp_path / "sheet.png")
    assert "originals  " not in told("inspect", tmp_path / "set", *sheet)
    # A copy that was made without it gets it later.
    origin.write_bytes(content)
    assert f"1 files with {len(content)} bytes copied" in told(
        "push", own_copy.directory, "s3://sets/e", "--check", "size"
    )
    assert f"1 files with {len(content)} bytes copied" in told("pull", "s3://sets/e", tmp_path / "set")
    assert "originals     short side 20 to 22 px" in told("inspect", tmp_path / "set", *sheet)
    assert "originals     short side 20 to 22 px" in told("inspect", "s3://sets/e", *sheet)
    assert load_index(tmp_path / "set").digest == load_index("s3://sets/e").digest == own_copy.digest
    # The same images prepared elsewhere have another state, which is of no use at the URL.
    origin.write_bytes(content.replace(b'"state": "', b'"state": "f'))
    assert "nothing to do" in told("push", own_copy.directory, "s3://sets/e")
    assert s3.cat_file("sets/e/origin.json") == content


def test_pull_does_not_fail_for_the_sizes_of_the_originals(
    server: FaultyServer, prepared: ShardIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (prepared.directory / "origin.json").read_bytes()
    for number, (fault, said) in enumerate(
        [
            (Fault(status=403), "permission denied (HTTP 403)"),
            (Fault(content=content[:-9]), "is damaged; push the data set again"),
            (Fault(content=content.replace(b'"20": 14', b'"20": 94')), "is damaged; push the data set again"),
        ]
    ):
        server.faults["origin.json"] = [fault]
        assert main(["pull", server.url, str(tmp_path / str(number))]) == 0
        error = capsys.readouterr().err
        assert "no origin.json is copied" in error
        assert said in error
        assert "origin.json" not in contents(tmp_path / str(number))
        verify_present(load_index(tmp_path / str(number)))


def test_places_that_take_nothing_are_refused(
    prepared: ShardIndex, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal("push", prepared.directory, "https://me:secret@host/x")
    assert "https://***@host/x: a web server takes no files" in said
    assert "is no URL: to copy to another folder of this machine, use cp -r" in refusal("push", prepared.directory, "x")
    assert "is a URL: pull it first" in refusal("push", "s3://me:secret@a/b", "s3://c/d")
    assert "is no URL" in refusal("pull", prepared.directory, tmp_path / "set")
    assert f"no prepared data set at {tmp_path}" in refusal("push", tmp_path, "s3://c/d")


def test_s3_that_refuses_or_is_not_there_is_told(
    s3: S3FileSystem, prepared: ShardIndex, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "there is no such bucket" in refusal("push", prepared.directory, "s3://nowhere/x")
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    said = refusal("push", prepared.directory, "s3://sets/x")
    assert "check AWS_ENDPOINT_URL" in said
    assert "2 attempts" in said
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    assert "there are no credentials; set AWS_ACCESS_KEY_ID" in refusal("push", prepared.directory, "s3://sets/x")


def test_pull_over_http_continues_and_fetches_altered_files_again(
    server: FaultyServer, prepared: ShardIndex, tmp_path: Path, told: Callable[..., str], refusal: Refusal
) -> None:
    out = tmp_path / "set"
    server.faults["00004.tar"] = [Fault(status=403)]
    said = refusal("pull", server.url, out, "--workers", 1, code=1)
    assert "shard 00004.tar" in said
    assert "permission denied (HTTP 403)" in said
    assert "the same command continues" in said
    assert not out.exists()
    # What arrives altered is fetched once more.
    server.faults["00006.tar"] = [Fault(altered=True)]
    told("pull", server.url, out, "--workers", 1)
    assert contents(out) == contents(prepared.directory)
    assert (server.gets["00000.tar"], server.gets["00004.tar"], server.gets["00006.tar"]) == (1, 2, 2)
    (out / "00001.tar").write_bytes(b"damaged")
    (out / "00002.offsets").unlink()
    assert "2 files with" in told("pull", server.url, out)
    verify_present(load_index(out))


def test_interrupted_pull_says_where_it_goes_on_and_does(
    server: FaultyServer, prepared: ShardIndex, tmp_path: Path, told: Callable[..., str], refusal: Refusal
) -> None:
    out = tmp_path / "set"

    def interrupted(storage: object, file: DataFile, *arguments: object, **named: object) -> None:
        if file.name == "00004.tar":
            raise KeyboardInterrupt
        fetch(storage, file, *arguments, **named)  # pyright: ignore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "fetch", interrupted)
        said = refusal("pull", server.url, out, "--workers", 1, code=130)
    assert said == f"data.prepare: interrupted; the same command continues with what is in {tmp_path}/.set.unfinished\n"
    assert [entry.name for entry in tmp_path.iterdir()] == [".set.unfinished"]
    told("pull", server.url, out, "--workers", 1)
    assert contents(out) == contents(prepared.directory)
    assert (server.gets["00003.tar"], server.gets["00005.tar"]) == (1, 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_pull_refuses_other_folders(
    server: FaultyServer, version_1: ShardIndex, tmp_path: Path, refusal: Refusal
) -> None:
    assert "holds another prepared data set" in refusal("pull", server.url, version_1.directory)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert "holds other files" in refusal("pull", server.url, tmp_path / "mine")
    assert "index.json" in refusal("pull", f"{server.url}/no/such", tmp_path / "set")


def test_pull_to_a_disk_that_is_too_full_is_refused(
    server: FaultyServer, prepared: ShardIndex, tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    needed = sum(file.num_bytes for file in prepared.files)
    said = refusal("pull", server.url, tmp_path / "set", code=1)
    assert f"{needed} bytes are still to be copied, 1000 are free" in said
