"""Damaged files of a run directory: a resumed run reads its notes, or says which it ignores; nothing ends it."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.stream.batches import BadSampleLimit, Replaced
from tests.data.fuzz import altered, fuzz, mutated
from tests.trainer.runs import configure
from tests.trainer.tracking.helpers.jsonl_sink import JsonLinesSink
from tests.trainer.tracking.helpers.opened import opened
from trainer.checkpoint.resume import newest_to_resume
from trainer.config.io import dump_config
from trainer.engine.ranks import Ranks
from trainer.rank.replaced import FILE_NAME, ReplacedSamples
from trainer.tracking.command import main
from trainer.tracking.identity import begin_new_run
from trainer.tracking.spool import read_curves
from trainer.tracking.tracker import NullTracker, UploaderProcess

pytestmark = pytest.mark.fuzz


class NoProcess(UploaderProcess):
    """An uploader that is never started; the test uploads in this process."""

    def start(self) -> None:
        return

    def wait(self, timeout_s: float) -> bool:
        return True


def deliver(run: Path, *more: str) -> int:
    uri = f"file://{run.parent}/server.jsonl"
    words = ["deliver", "--run", str(run), "--timeout", "0", "--uri", uri, *more]
    return main(words, sinks={"mlflow": JsonLinesSink})


def report(run: Path, step: int) -> None:
    """What one start of a run reports, and its delivery."""
    tracker = opened(run, None, last_step=step, uploader=NoProcess)
    tracker.log_metrics(step + 1, {"loss_g": 1.0, "loss_d": float("nan")})
    (run / "samples.png").write_bytes(b"png")
    tracker.log_image(step + 1, "samples", run / "samples.png")
    tracker.log_artifact(run / "samples.png", "samples")
    tracker.close("KILLED")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run that has been started twice and delivered once."""
    run = tmp_path / "run"
    (run / "tracking").mkdir(parents=True)
    report(run, 0)
    assert deliver(run) == 0
    report(run, 1)
    (run / FILE_NAME).write_text("shard 00000.tar, key 1: the image is damaged\n")
    return run


@pytest.fixture
def resume(run: Path, caplog: pytest.LogCaptureFixture) -> Callable[[str, bytes], None]:
    """Does what a resumed run does with its directory, one file of which has other bytes."""
    shutil.copytree(run, run.with_name("kept"))

    def resume(name: str, content: bytes) -> None:
        shutil.rmtree(run)
        shutil.copytree(run.with_name("kept"), run)
        run.with_name("server.jsonl").unlink(missing_ok=True)
        (run / name).write_bytes(content)
        read_curves(run)
        report(run, 2)
        assert read_curves(run)["loss_g"][-1] == (3, 1.0)
        assert deliver(run) in (0, 1)
        assert deliver(run, "--new-run") in (0, 1)
        begin_new_run(run)
        assert not [record for record in caplog.records if record.exc_info], "a traceback in the log"
        caplog.clear()

    return resume


def lines_altered(content: bytes, draws: random.Random) -> bytes:
    """JSON lines with one of other values."""
    lines = content.splitlines()
    number = draws.randrange(len(lines))
    lines[number] = json.dumps(altered(json.loads(lines[number]), draws)).encode()
    return b"\n".join([*lines, b""])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlflow/delivered.json", "identity.json", "spool.jsonl", "config.yaml"])
def test_notes_of_tracking(name: str, run: Path, resume: Any, pytestconfig: pytest.Config) -> None:
    def damaged(content: bytes, draws: random.Random) -> bytes:
        as_values = name != "config.yaml" and draws.randrange(3)
        return lines_altered(content, draws) if as_values else mutated(content, draws)

    good = (run / "tracking" / name).read_bytes()
    fuzz(pytestconfig, [good], lambda content: resume(f"tracking/{name}", content), damage=damaged, num_inputs=50)


def test_list_of_replaced_samples(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    ranks = Ranks.join("cpu", 60)

    def read(content: bytes) -> None:
        (tmp_path / FILE_NAME).write_bytes(content)
        samples = ReplacedSamples(tmp_path, ranks, BadSampleLimit(max_percent=100, num_samples=10))
        samples.note([bad := Replaced("00000.tar", "next", "shard 00000.tar, key 1: the image is damaged")])
        samples.publish(NullTracker())
        assert str(bad).encode() in (tmp_path / FILE_NAME).read_bytes().splitlines()

    fuzz(pytestconfig, [b"shard 00000.tar, key 0: the image is damaged\n"], read)
    ranks.leave()


def test_config_of_the_last_start(tiny: tuple[str, ...], tmp_path: Path, pytestconfig: pytest.Config) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = configure(tiny, run, f"checkpoint.directory={tmp_path}/elsewhere")

    def read(content: bytes) -> None:
        (run / "config.yaml").write_bytes(content)
        assert newest_to_resume(config, fetch=False) is None

    fuzz(pytestconfig, [dump_config(config).encode()], read, num_inputs=50)
