"""Data sets of the Hugging Face Hub, from a Hub on loopback: what is fetched, what is kept, and what is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from data.fetch.hub import fetch_tables
from data.prepare.command import main
from data.sources.find import open_source
from data.storage.errors import UserError
from tests.data.hub import Hub, serve_hub
from tests.data.tables import image_table, number_of, write_hub_folder, write_parquet

NAME = "hf:me/pictures"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with one data set, and an empty cache of its client."""
    with serve_hub("me/pictures", write_hub_folder(tmp_path / "set")) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def refusal(name: str = NAME, *, subset: str | None = None, split: str | None = None) -> str:
    with pytest.raises(UserError) as refused:
        fetch_tables(name, subset=subset, split=split)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_part_is_fetched_once_and_gives_the_bytes_of_the_folder(hub: Hub, tmp_path: Path) -> None:
    source = open_source(NAME)
    assert [number_of(source.read(item)) for item in source.items] == list(range(25))
    assert (source.class_names, source.description) == (("cat", "dog", "owl"), "hf:me/pictures:image")
    assert source.notes == ("read: column image, labels label, split train of test, train",)
    train = {f"data/train-0000{number}-of-00002.parquet" for number in range(2)}
    assert set(hub.gets) == {"README.md", *train}
    shape = ["--size", "16", "--workers", "0", "--out"]
    assert main([NAME, *shape, str(tmp_path / "a")]) == 0
    assert main([str(tmp_path / "set"), *shape, str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()
    assert set(hub.gets.values()) == {1}
    assert len(open_source(NAME, split="test").items) == 6


def test_revision_that_is_asked_for_is_read(hub: Hub, tmp_path: Path) -> None:
    hub.revisions["v1"] = tmp_path / "v1"
    write_parquet(tmp_path / "v1" / "data" / "train-00000-of-00001.parquet", image_table(range(4)))
    assert len(open_source(f"{NAME}@v1").items) == 4
    assert open_source(f"{NAME}@v1").state != open_source(NAME).state
    assert "the Hub has no such revision" in refusal(f"{NAME}@v2")


def test_card_declares_subsets_and_splits(hub: Hub, tmp_path: Path) -> None:
    write_parquet(tmp_path / "set" / "more" / "a.parquet", image_table(range(7)))
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: few\n  data_dir: more\n  data_files: '*.parquet'\n"
        "- config_name: many\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "  - split: held_out\n    path: [data/test-*]\n---\n# Pictures\n"
    )
    assert "has several subsets; say which one with --subset NAME: few, many" in refusal()
    assert len(open_source(NAME, subset="few").items) == 7
    assert len(open_source(NAME, subset="many").items) == 25
    assert len(open_source(NAME, subset="many", split="held_out").items) == 6
    assert "--split is test, but its splits are: train, held_out" in refusal(subset="many", split="test")
    (tmp_path / "set" / "more" / "a.parquet").unlink()
    for configs in ("[", "3", "[{data_files: [{}]}]", "[{data_files: nothing-*}]"):
        (tmp_path / "set" / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
        assert len(fetch_tables(NAME, subset=None, split="train").files) == 2


def test_data_set_without_tables_is_read_from_the_copy_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.revisions["main"] = tmp_path / "archives"
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "train.zip").write_bytes(b"")
    assert "has no tables, but train.zip; Where there is a network: hf download me/pictures" in refusal()
    hub.revisions["refs/convert/parquet"] = copy = tmp_path / "copy"
    write_parquet(copy / "default" / "train" / "0000.parquet", image_table(range(8)))
    write_parquet(copy / "default" / "test" / "0000.parquet", image_table(range(3)))
    assert len(open_source(NAME).items) == 8
    assert len(open_source(NAME, split="test").items) == 3
    (copy / "default" / "train").rename(copy / "default" / "partial-train")
    assert "the Hub's copy as Parquet has only a part of it" in refusal()


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "GatedRepo", "its owner grants access; ask for it on the page of me/pictures, and set HF_TOKEN"),
        (401, "RepoNotFound", "the Hub has no such data set, or it is private: check the name, or set HF_TOKEN"),
        (500, "", "could not be fetched: .*Where there is a network: hf download me/pictures --repo-type dataset"),
    ],
)
def test_refusal_of_the_hub_says_what_to_do(hub: Hub, status: int, code: str, words: str) -> None:
    hub.status, hub.code = status, code
    with pytest.raises(UserError, match=words):
        fetch_tables(NAME, subset=None, split=None)


def test_offline_what_is_in_the_cache_is_read_and_the_rest_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_tables(NAME, subset=None, split=None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.status = 500
    assert len(open_source(NAME).items) == 25
    assert "could not be fetched" in (told := refusal("hf:me/others"))
    assert "hf download me/others --repo-type dataset --local-dir FOLDER; then give FOLDER as the source" in told


def test_name_of_another_form_is_refused(hub: Hub) -> None:
    for name in ("hf:", "hf:mnist", "hf:a/b/c", "hf:../x", "hf:a/b@", "hf:a b/c"):
        assert "expected is hf:OWNER/NAME or hf:OWNER/NAME@REVISION" in refusal(name)
