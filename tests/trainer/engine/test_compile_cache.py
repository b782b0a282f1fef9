"""Compiled code is kept for later starts, and one rank of a host compiles it for the others."""

import fcntl
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from tests.launch import run_python
from trainer.engine.compile_cache import CompileCache, cache_key, user_folder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "unset")


def locks_of(cache: CompileCache) -> list[Path]:
    assert cache.folder is not None
    return list((cache.folder / "turns").iterdir())


def is_free(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_the_folder_is_in_the_users_cache_folder_and_named_after_versions(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = CompileCache(None, CPU)
    assert cache.folder is not None
    assert cache.folder == tmp_path / "ddgan" / "compiled" / cache_key(CPU)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache.folder)
    assert f"torch-{torch.__version__}-triton-" in cache_key(CPU)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_folder() == Path.home() / ".cache" / "ddgan" / "compiled"


def test_others_wait_while_one_compiles_and_not_for_other_code(tmp_path):
    cache = CompileCache(str(tmp_path), CPU)
    with cache.turn("a", 1):
        (first,) = locks_of(cache)
        assert not is_free(first)
        with CompileCache(str(tmp_path), CPU).turn("b", 1):
            assert len(locks_of(cache)) == 2
    assert all(map(is_free, locks_of(cache)))


def test_those_who_waited_load_at_the_same_time(tmp_path):
    cache = CompileCache(str(tmp_path), CPU)
    with cache.turn("a", 1):
        pass
    (lock,) = locks_of(cache)
    with lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        with cache.turn("a", 1):
            assert is_free(lock)


def test_a_killed_compiler_holds_up_nobody(tmp_path):
    cache = CompileCache(str(tmp_path), CPU)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        cache._lock("a")
        os.write(writer, b"locked")
        signal.pause()
    assert os.read(reader, 6) == b"locked"
    (lock,) = locks_of(cache)
    assert not is_free(lock)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with cache.turn("a", 1):
        assert not is_free(lock)
    os.close(reader)
    os.close(writer)


def test_a_folder_that_others_can_write_is_not_used(tmp_path, caplog):
    (tmp_path / cache_key(CPU)).mkdir()
    (tmp_path / cache_key(CPU)).chmod(0o777)
    cache = CompileCache(str(tmp_path), CPU)
    assert cache.folder is None
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "unset"
    assert "others than this user can write" in caplog.text
    with cache.turn("a", 1):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert CompileCache(str(tmp_path / "file"), CPU).folder is None
    assert "engine.compile_cache cannot be used" in caplog.text


@pytest.mark.slow
def test_a_second_start_compiles_nothing(tmp_path):
    said = []
    for _ in range(2):
        done = run_python(["-m", "tests.trainer.engine.processes.compiles_one_block", str(tmp_path)])
        assert "failed False" in done.stdout, done.stderr[-3000:] + done.stdout
        found = re.search(r"compiled 1 kinds of blocks \((\d+) graphs, (\d+) from (.*)\) in \d+ s", done.stdout)
        assert found, done.stdout
        assert found[3] == str(tmp_path / cache_key(CPU))
        said.append((int(found[1]), int(found[2])))
    (num_graphs, _), _ = said
    assert said == [(num_graphs, 0), (num_graphs, num_graphs)]
    assert num_graphs
