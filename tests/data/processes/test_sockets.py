"""Worker processes start wherever temporary files are."""

import operator
import os
import tempfile
from multiprocessing import process
from pathlib import Path

import pytest

from data.processes.pool import map_in_order
from data.processes.sockets import LONGEST_FOLDER, use_short_socket_folder


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The settings of this process for multiprocessing, restored afterwards."""
    found: dict[str, object] = process.current_process()._config  # pyright: ignore[reportAttributeAccessIssue]
    kept = {name: value for name, value in found.items() if name != "tempdir"}
    monkeypatch.setattr(process.current_process(), "_config", kept)
    return kept


def use_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> Path:
    folder = tmp_path / ("x" * (num_bytes - len(os.fsencode(tmp_path)) - 1))
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_folder_that_is_short_enough_is_used(tmp_path, monkeypatch, config):
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    use_short_socket_folder()
    assert "tempdir" not in config
    assert LONGEST_FOLDER >= 70


def test_workers_start_with_a_long_folder_for_temporary_files(tmp_path, monkeypatch, config):
    folder = use_folder(tmp_path, monkeypatch, 150)
    assert list(map_in_order(operator.neg, range(3), 1)) == [0, -1, -2]
    assert str(config["tempdir"]).startswith("/tmp/pymp-")
    assert tempfile.gettempdir() == str(folder), "other temporary files stay there"
