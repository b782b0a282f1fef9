"""Damaged configs: `trainer.run --dry-run` prints a plan or refuses with code 2, whatever is in file and overrides."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY
from tests.data.fuzz import altered, fuzz
from trainer.config.io import dump_config, load_config, load_stored, to_dict
from trainer.run import main

pytestmark = pytest.mark.fuzz


@pytest.fixture
def dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command, on a config of its own and in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(content: bytes, *overrides: str) -> None:
        (tmp_path / "config.yaml").write_bytes(content)
        words = [word for override in overrides for word in ("--set", override)]
        code = main(["--config", "./config.yaml", "--dry-run", *words])
        told = capsys.readouterr()
        assert (code, bool(told.out), bool(told.err)) in ((0, True, False), (2, False, True)), (code, told)
        assert all(c.isprintable() or c == "\n" for c in told.err), told.err
        assert len(told.err) < 20_000 + len(content)
        assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
        if code == 0 and not overrides:
            assert load_stored(tmp_path / "config.yaml") == load_config(str(tmp_path / "config.yaml"))

    return run


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    """Every setting of a run of tiny networks in two stages."""
    first = "{images: 64, training: {objective: gaussian, adam: {beta1: 0.9}}, diffusion: {num_timesteps: 3}}"
    return to_dict(load_config("digits", [*TINY, f"stages={{first: {first}}}"]))


@pytest.mark.slow
def test_bytes(dry_run: Any, good: dict[str, Any], pytestconfig: pytest.Config) -> None:
    texts = [dump_config(load_config("digits", TINY)).encode(), json.dumps(good).encode()]
    fuzz(pytestconfig, texts, dry_run, num_inputs=40)


@pytest.mark.slow
def test_values(dry_run: Any, good: dict[str, Any], pytestconfig: pytest.Config) -> None:
    def read(values: Any) -> None:
        dry_run(json.dumps(values).encode())

    fuzz(pytestconfig, [good], read, damage=altered, num_inputs=8)


@pytest.mark.slow
def test_overrides(dry_run: Any, good: dict[str, Any], pytestconfig: pytest.Config) -> None:
    content = json.dumps(good).encode()

    def overridden(overrides: list[str], draws: random.Random) -> list[str]:
        section, fields = draws.choice([(name, fields) for name, fields in good.items() if fields])
        name = draws.choice(list(fields))
        value = altered([fields[name]], draws)
        words = draws.choice([json.dumps(value), json.dumps(value).strip("[]"), str(value)])
        return [*overrides, f"{section}.{name}{draws.choice(['=', '=', '=', '=', '.x=', '', '=='])}{words}"]

    def read(overrides: list[str]) -> None:
        dry_run(content, *overrides)

    fuzz(pytestconfig, [[], ["training.r1_gamma=0.5"]], read, damage=overridden, num_inputs=8)
