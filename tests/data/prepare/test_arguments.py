"""Arguments of the command: what its help says, and what each mistake is told before anything is read."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from data.prepare.command import main
from data.shards.index import load_index

Refusal = Callable[..., str]


def test_folder_of_the_name_of_a_command_is_given_with_its_path(
    class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    shutil.copytree(class_folder, tmp_path / "inspect")
    monkeypatch.chdir(tmp_path)
    assert main(["./inspect", "--out", "set", "--size", "8"]) == 0
    assert load_index("set").source == "folder:inspect"
    assert "see python -m data.prepare inspect --help" in refusal("inspect", "--out", "other", "--size", 8)


@pytest.mark.parametrize("command", [[], ["inspect"], ["verify"]])
def test_help_names_the_other_commands_and_kinds(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    if not command:
        for kind in (
            "cifar-10-python.tar.gz",
            "mnist:",
            "fashionmnist:",
            "stackedmnist:",
            "LMDB",
            "WebDataset",
            ".zip",
        ):
            assert kind in told
        assert "inspect DIR" in told
        assert "verify DIR" in told
        assert max(map(len, told.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/no/such", "--size", "8"], "source /no/such: no such file or folder; allowed are"),
        (["digits", "--size", "3"], "--size: '3' is given, allowed is a whole number of 4 to 8192"),
        (["digits", "--size", "8193"], "--size: '8193' is given, allowed is a whole number of 4 to 8192"),
        (
            ["digits", "--workers", "9" * 12],
            "--workers: '999999999999' is given, allowed is a whole number of 0 to 1024",
        ),
        (["s3://me:secret@bucket/x", "--size", "8"], "cannot list s3://***@bucket/x: "),
        ([""], "SOURCE: '' is given, expected is a path"),
        (["digits", "--out", ""], "--out: '' is given, expected is a path"),
        (["digits", "--size", "big"], "--size: 'big' is given"),
        (["digits", "--channels", "2"], "--channels 2 is given, but digits has no conditions"),
        (["digits", "--max-bad", "120"], "--max-bad: '120' is given, allowed is a percentage of 0 to 100"),
        (["digits", "--seed", "-1"], "--seed: '-1' is given, allowed is a whole number of 0 to 18446744073709551615"),
        (["digits", "--shard-mb", "5", "--shard-samples", "5"], "not allowed with argument --shard-mb"),
        (["digits", "--siez", "8"], "unrecognized arguments: --siez 8"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    tmp_path: Path, refusal: Refusal, arguments: list[str], told: str
) -> None:
    assert told in refusal("--out", tmp_path / "set", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_url_is_refused_and_not_taken_for_a_folder(
    class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    monkeypatch.chdir(tmp_path)
    told = refusal(class_folder, "--out", "s3://me:secret@bucket/set", "--size", 8)
    assert "--out s3://***@bucket/set is a URL, but data sets are prepared on a local disk; name a folder" in told
    assert list(tmp_path.iterdir()) == []


def test_out_that_is_a_circle_of_links_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "set").symlink_to("set")
    assert f"--out {tmp_path}/set is a circle of links" in refusal("digits", "--out", tmp_path / "set")


def test_ray_that_does_not_answer_is_told_before_anything_is_made(
    class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        told = refusal(class_folder, "--out", tmp_path / "set", "--size", 8, "--ray")
    assert f"RAY_ADDRESS is {address}, but nothing answers there" in told
    assert list(tmp_path.iterdir()) == []


def test_folder_needs_a_size(class_folder: Path, tmp_path: Path, refusal: Refusal) -> None:
    told = refusal(class_folder, "--out", tmp_path / "set")
    assert f"--size is missing: folder:{class_folder.name} has no default; give one of 4 or more, e.g. 64" in told
