"""Parquet and Arrow tables of any origin: what is read, what is guessed, and what is refused."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data.formats.spool import Place
from data.prepare.command import main
from data.prepare.encode import PreparedForm, prepare_items
from data.sources.find import open_source
from data.sources.source import HeldSource, Source, SourceError, fingerprint
from data.sources.tables import TableSource
from data.storage.files import sha256_of
from tests.data.tables import (
    featured,
    image_table,
    number_of,
    picture,
    write_hub_folder,
    write_parquet,
    write_saved,
)
from tests.launch import ROOT

FORM = PreparedForm(size=16, channels=3, upscale=False)


def numbers_of(source: Source) -> list[int]:
    return [number_of(source.read(item)) for item in source.items]


def refusal(path: Path | str, **options: Any) -> str:
    with pytest.raises(SourceError) as refused:
        open_source(str(path), **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def digests(out: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in sorted(out.iterdir()) if file.suffix in (".tar", ".offsets")}


def test_folder_of_the_hub_is_recognised_and_its_training_part_is_read(tmp_path: Path) -> None:
    source = open_source(str(write_hub_folder(tmp_path / "pictures")))
    assert isinstance(source, TableSource)
    assert numbers_of(source) == list(range(25))
    assert [item.label for item in source.items] == [number % 3 for number in range(25)]
    assert source.class_names == ("cat", "dog", "owl")
    assert source.items[16].name == "data/train-00001-of-00002.parquet@1"
    assert source.description == "parquet:pictures:image"
    assert "split train of test, train" in source.notes[0] and "column image" in source.notes[0]
    assert numbers_of(open_source(str(tmp_path / "pictures"), split="test")) == list(range(100, 106))
    assert "--split is val, but its splits are: test, train" in refusal(tmp_path / "pictures", split="val")
    assert "--subset a is given, but it has no subsets" in refusal(tmp_path / "pictures", subset="a")


@pytest.mark.parametrize("form", ["bytes", "paths"])
def test_table_of_bytes_or_of_paths_is_read(tmp_path: Path, form: str) -> None:
    table = image_table(range(12), names=None)
    if form == "paths":
        (tmp_path / "files").mkdir()
        for number in range(12):
            (tmp_path / "files" / f"{number}.png").write_bytes(picture(number))
        table = table.set_column(0, "path", pa.array([f"files/{number}.png" for number in range(12)]))
    file = write_parquet(tmp_path / "set.parquet", table)
    for name in (str(file), f"parquet:{file}", f"parquet:{tmp_path}"):
        source = open_source(name)
        assert numbers_of(source) == list(range(12))
        assert source.class_names == ("0", "1", "2")
        # The files that paths lead to may have changed although the table has not.
        assert (source.state == open_source(name).state) == (form == "bytes")


def test_struct_without_bytes_leads_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture(1))
    images = [{"bytes": picture(0), "path": "a.png"}, {"bytes": None, "path": "1.png"}]
    source = open_source(str(write_parquet(tmp_path / "set.parquet", pa.table({"image": images}))))
    assert numbers_of(source) == [0, 1]
    assert source.class_names is None


@pytest.mark.parametrize("is_stream", [True, False])
def test_arrow_files_are_read(tmp_path: Path, is_stream: bool) -> None:
    table, new = image_table(range(20)), pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with pa.OSFile(str(tmp_path / "set.arrow"), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    source = open_source(str(tmp_path / "set.arrow"))
    assert numbers_of(source) == list(range(20))
    assert [item.label for item in source.items] == [number % 3 for number in range(20)]


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    write_saved(tmp_path / "one", image_table(range(20)))
    assert numbers_of(open_source(str(tmp_path / "one"))) == list(range(20))
    write_saved(tmp_path / "both" / "train", image_table(range(9)))
    write_saved(tmp_path / "both" / "test", image_table(range(9, 12)))
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert numbers_of(open_source(str(tmp_path / "both"))) == list(range(9))
    assert numbers_of(open_source(str(tmp_path / "both"), split="test")) == [9, 10, 11]
    for content in ("{", '{"splits": ["../x"]}', '{"splits": [3]}', '{"splits": []}', "[]"):
        (tmp_path / "both" / "dataset_dict.json").write_text(content)
        assert "dataset_dict.json is damaged" in refusal(tmp_path / "both")
    for content in ("{", '{"_data_files": [{"filename": "/etc/passwd"}]}', '{"_data_files": ["x"]}'):
        (tmp_path / "one" / "state.json").write_text(content)
        assert "state.json" in refusal(tmp_path / "one")


def test_subset_is_chosen_where_there_are_several(tmp_path: Path) -> None:
    write_parquet(tmp_path / "big" / "train-00000-of-00001.parquet", image_table(range(9)))
    write_parquet(tmp_path / "small" / "train-00000-of-00001.parquet", image_table(range(3)))
    assert "has several subsets; say which one with --subset NAME: big, small" in refusal(f"parquet:{tmp_path}")
    assert numbers_of(open_source(f"parquet:{tmp_path}", subset="small")) == [0, 1, 2]


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({"a": [b"x"], "b": [b"x"]}, {}, "several columns may hold the images (a, b); say which one with --column"),
        (
            {"a": [1], "b": ["x"]},
            {},
            "no column seems to hold images; say which one with --column NAME; its columns: a",
        ),
        ({"a": [b"x"]}, {"column": "c"}, "--column is c, but there is no such column; its columns: a (binary)"),
        ({"a": [1.5]}, {"column": "a"}, "its column a is double, but images are bytes"),
        ({"a": [[1, 2]]}, {"column": "a"}, "its column a is list<"),
        ({"a": [b"x"], "y": [1], "label": [2]}, {}, "several columns may hold the labels (y, label); say which one"),
        ({"a": [b"x"]}, {"label": "c"}, "--label is c, but there is no such column"),
        ({"a": [b"x"], "b": [[0.0, 1.0]]}, {"label": "b"}, "its column b is list<"),
        ({"a": [b"x"], "b": [1.0]}, {"label": "b"}, "its column b is double, but labels are whole numbers or names"),
        ({"a": [b"x"], "label": [-1]}, {}, "is -1 in set.parquet@0, which is how the test rows"),
        ({"a": [b"x"], "label": [10**9]}, {}, "class numbers are 0 to 100000"),
        ({"a": [b"x", b"y"], "label": [1, None]}, {}, "is null in 1 of 2 rows, such as set.parquet@1"),
        ({"a": pa.array([], pa.binary())}, {}, "its 1 tables have no rows"),
        ({"a": [b"x"]}, {"classes": "folders"}, "the classes of tables come from a column"),
    ],
)
def test_what_is_not_clear_is_refused(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    write_parquet(tmp_path / "set.parquet", pa.table(columns))
    assert words in refusal(tmp_path / "set.parquet", **options)


def test_columns_that_the_user_names_are_read_or_no_labels_at_all(tmp_path: Path) -> None:
    images = [picture(number) for number in range(4)]
    names = ["owl", "cat", "owl", "dog"]
    table = pa.table(
        {"a": images, "b": images[::-1], "label": [0, 1, 2, 3], "kind": pa.array(names).dictionary_encode()}
    )
    file = write_parquet(tmp_path / "set.parquet", table)
    source = open_source(str(file), column="b", label="kind")
    assert numbers_of(source) == [3, 2, 1, 0]
    assert source.class_names == ("cat", "dog", "owl")
    assert [item.label for item in source.items] == [2, 0, 2, 1]
    assert source.description != open_source(str(file), column="a", label="kind").description
    bare = open_source(str(file), column="a", classes="none")
    assert bare.class_names is None and {item.label for item in bare.items} == {None}
    assert fingerprint(bare) != fingerprint(open_source(str(file), column="a"))


def test_features_of_datasets_decide_where_names_do_not(tmp_path: Path) -> None:
    columns = {"x": [picture(0)], "thumbnail": [picture(1)], "label": [7], "breed": [1]}
    features = {"x": {"_type": "Image"}, "breed": {"_type": "ClassLabel", "names": ["pug", "poodle"]}}
    source = open_source(str(write_parquet(tmp_path / "set.parquet", featured(columns, features))))
    assert numbers_of(source) == [0]
    assert (source.items[0].label, source.class_names) == (1, ("pug", "poodle"))


def test_tables_of_different_columns_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", image_table(range(3)))
    write_parquet(tmp_path / "b.parquet", image_table(range(3), label="y"))
    assert "b.parquet: its columns are not those of a.parquet" in refusal(tmp_path)


def test_table_beside_images_stays_what_it_was_and_options_of_tables_are_for_tables(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(picture(1))
    write_parquet(tmp_path / "list.parquet", pa.table({"file": ["1.png"]}))
    assert open_source(str(tmp_path)).description.startswith("folder:")
    for option in ("column", "label", "subset"):
        assert f"--{option} x is given, but folder is no table" in refusal(tmp_path, **{option: "x"})
    (tmp_path / "empty").mkdir()
    assert "no .parquet and no .arrow files in it" in refusal(f"parquet:{tmp_path / 'empty'}")


def test_unusable_rows_are_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images: list[bytes | None] = [picture(number) for number in range(40)]
    images[3:6] = [b"no image", None, picture(1)[:60]]
    file = write_parquet(tmp_path / "set.parquet", pa.table({"image": images, "path": ["/etc/passwd"] * 40}))
    arguments = [str(file), "--out", str(tmp_path / "out"), "--size", "16", "--max-bad", "10", "--workers", "0"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "3 unusable images were left out:" in said
    assert "set.parquet@3 is no image of a known format" in said
    assert "set.parquet@4 cannot be read: it is null" in said
    assert "set.parquet@5 is damaged" in said
    assert main([*arguments, "--column", "path", "--out", str(tmp_path / "paths")]) == 1
    assert "does not lead to a file below the folder" in capsys.readouterr().err


@pytest.mark.slow
def test_bytes_do_not_depend_on_processes_nor_on_a_stop(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "a.parquet", image_table(range(200)))
    write_parquet(tmp_path / "set" / "b.parquet", image_table(range(200, 300)), row_group_size=1000)
    found = []
    for workers in ("0", "2"):
        out = tmp_path / f"out{workers}"
        shape = ["--size", "16", "--shard-samples", "40", "--skip-images", "11"]
        assert main([str(tmp_path / "set"), "--out", str(out), *shape, "--workers", workers]) == 0
        found.append(digests(out))
    assert found[0] == found[1] and len(found[0]) == 16
    # Killed after some shards, and given again.
    stopped = [str(tmp_path / "set"), "--out", str(tmp_path / "again"), *shape, "--workers", "0"]
    code = (
        "import os, sys, data.prepare.journal as j, data.prepare.command as c\n"
        "save = j.Journal.save\n"
        "def kill(self, file):\n"
        "    save(self, file)\n"
        "    if len(self.finished) == 3: os.kill(os.getpid(), 9)\n"
        "j.Journal.save = kill\n"
        "c.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *stopped], cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert main(stopped) == 0
    assert digests(tmp_path / "again") == found[0]


def test_another_process_reads_the_copy_and_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "room"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "room").mkdir()
    source = open_source(str(write_hub_folder(tmp_path / "pictures")), skip_images=3)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.items == ()
    assert prepare_items(copy, list(source.items), FORM) == prepare_items(source, list(source.items), FORM)
    assert list((tmp_path / "room").iterdir()) == []


def test_another_machine_gets_the_images_themselves(tmp_path: Path) -> None:
    table = image_table(range(12))
    rows = [*table["image"].to_pylist()[:10], None, {"bytes": None, "path": "../outside.png"}]
    table = table.set_column(0, table.schema.field("image"), pa.array(rows, table.schema.field("image").type))
    source = open_source(str(write_parquet(tmp_path / "pictures.parquet", table)))
    assert isinstance(source, TableSource)
    assert source.only_here
    elsewhere = replace(source, place=Place("/proc/self/fd/9999", 0, 12))
    with pytest.raises(SourceError, match=r"copied to a file of another process, .*; give the command again"):
        elsewhere.read(source.items[0])
    sent = pickle.dumps(HeldSource.of(source, source.items))
    expected = prepare_items(source, list(source.items), FORM)
    assert [prepared.error is None for prepared in expected] == [True] * 10 + [False] * 2
    assert prepare_items(pickle.loads(sent), list(source.items), FORM) == expected


def test_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = partial(open, "/dev/full", "wb")
    monkeypatch.setattr("data.formats.spool.tempfile.TemporaryFile", lambda **options: full())
    source = open_source(str(write_hub_folder(tmp_path / "pictures")))
    with pytest.raises(SourceError, match=r"is full; free some space there, or set TMPDIR to a folder of another disk"):
        source.read(source.items[0])


@pytest.mark.parametrize("damage", ["cut", "pages", "empty", "text"])
def test_damaged_table_is_refused_in_one_line(tmp_path: Path, damage: str, refusal: Callable[..., str]) -> None:
    file = write_parquet(tmp_path / "set.parquet", image_table(range(60)))
    content = bytearray(file.read_bytes())
    if damage == "pages":
        content[4:60] = bytes(56)
    file.write_bytes({"cut": content[:-100], "pages": content, "empty": b"", "text": b"<html>"}[damage])
    said = refusal(file, "--out", tmp_path / "out", "--size", "16", "--workers", "0")
    assert "set.parquet" in said and said.endswith("it again\n") and said.count("it again") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    image = b"\x89PNG" + bytes(range(256)) * 1024
    table = pa.table({"image": pa.array([image[: 200_000 + n] for n in range(1000)], pa.binary())})
    file = write_parquet(tmp_path / "set.parquet", table, row_group_size=1000, use_dictionary=False)
    assert file.stat().st_size < 200e6
    code = (
        "import resource, sys\nfrom data.sources.find import open_source\n"
        "source = open_source(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert len(source.read(source.items[999])) == 200_999\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 60e6  # the row group unpacks to 200e6
