"""Damaged checkpoints: each is resumed from, sampled, listed and verified as it was saved, or refused; nothing else.

The hashes of most inputs are right, as if a faulty program had written them: without them hardly any would be read.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.data.fuzz import REFUSALS, altered, fuzz, mutated
from tests.trainer.runs import Stopper, configure, train
from trainer.checkpoint import command, lease
from trainer.checkpoint.fingerprint import fingerprint
from trainer.checkpoint.format import MANIFEST, Checkpoint, encode_manifest
from trainer.checkpoint.resume import HISTORY, Resume, choose, newest_to_resume
from trainer.checkpoint.storage import find_checkpoint, storage_of_run
from trainer.checkpoint.whole import trained_generator
from trainer.config.train_config import TrainConfig
from trainer.engine.ranks import Ranks
from trainer.rank.metrics import StatisticsSum
from trainer.rank.worker import Worker
from trainer.sample.draw import load_run

pytestmark = pytest.mark.fuzz
STEP = "step-00000003"


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory) -> TrainConfig:
    """Of a run with one checkpoint."""
    config = configure(tiny, tmp_path_factory.mktemp("fuzzed") / "run")
    train(config, Stopper(3))
    return config


@pytest.fixture
def folder(config: TrainConfig, tmp_path: Path) -> Iterator[Path]:
    """Of the checkpoint, which is as it was again after the test."""
    run = Path(config.run.directory)
    shutil.copytree(run, tmp_path / "kept")
    yield run / "checkpoints" / STEP
    shutil.rmtree(run)
    shutil.copytree(tmp_path / "kept", run)


@pytest.fixture
def use(config, tmp_path, capsys, monkeypatch) -> Iterator[Callable[[], None]]:
    """Does with the run's checkpoint all that can be done with one."""
    monkeypatch.setattr(lease, "STALE_S", 0.0)
    monkeypatch.setattr(lease, "_POLL_S", 0.0)
    run, out = Path(config.run.directory), str(tmp_path / "out")
    ranks = Ranks.join("cpu", 60)
    worker = Worker(config, ranks, Stopper())
    assert worker.checkpoint
    of_a_step = worker.checkpoint.extras("statistics", 0)

    def resume() -> None:
        newest = newest_to_resume(config, fetch=True)
        assert newest
        sums = StatisticsSum(worker.learner.statistics)
        worker.state.load(newest, sums)
        sums.add(of_a_step)
        sums.take(ranks)
        dict(newest.manifest.get("metrics", {}))

    def commands() -> None:
        for words in ("list", "verify", "prune --dry-run", f"export --out={out}", f"convert --out={out}"):
            name, *more = words.split()
            assert command.main([name, str(run), *more]) in (0, 1, 2)
        shutil.rmtree(out, ignore_errors=True)
        told = capsys.readouterr()
        assert all(c.isprintable() or c == "\n" for c in told.out + told.err), told

    def read_weights() -> None:
        load_run(run)
        trained_generator(find_checkpoint(storage_of_run(run), 3))

    def use() -> None:
        for action in (resume, lambda: choose(config, Resume()), commands, read_weights):
            with suppress(*REFUSALS):
                action()
        with suppress(*REFUSALS):
            fingerprint(find_checkpoint(storage_of_run(run), 3))

    yield use
    worker.close()
    ranks.leave()


def sealed(manifest: Any) -> bytes:
    """The bytes of a manifest whose own hash is right, if it can have one."""
    return encode_manifest(manifest) if isinstance(manifest, dict) else json.dumps(manifest).encode()


@pytest.mark.slow
def test_manifest_bytes(folder: Path, use: Callable[[], None], pytestconfig: pytest.Config) -> None:
    def read(content: bytes) -> None:
        (folder / MANIFEST).write_bytes(content)
        use()

    fuzz(pytestconfig, [(folder / MANIFEST).read_bytes()], read, num_inputs=20)


@pytest.mark.slow
def test_manifest_values(folder: Path, use: Callable[[], None], pytestconfig: pytest.Config) -> None:
    def read(manifest: Any) -> None:
        (folder / MANIFEST).write_bytes(sealed(manifest))
        use()

    good = json.loads((folder / MANIFEST).read_bytes())
    del good["manifest_sha256"]
    small = good | {"config": {}, "versions": {}}  # so that half of the inputs are damaged elsewhere
    fuzz(pytestconfig, [good, small], read, damage=altered, num_inputs=25)


def damaged_part(content: bytes, draws: random.Random) -> bytes:
    """A part with another header, in its bytes or in its values; sometimes with other tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    match draws.randrange(4):
        case 0:
            return mutated(content[:end], draws) + content[end:]
        case 1:
            return mutated(content, draws)
        case _:
            header = json.dumps(altered(json.loads(content[8:end]), draws)).encode()
            return len(header).to_bytes(8, "little") + header + content[end:]


@pytest.mark.slow
def test_part(folder: Path, use: Callable[[], None], pytestconfig: pytest.Config) -> None:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["manifest_sha256"]
    ((name, entry),) = manifest["files"].items()
    good = (folder / name).read_bytes()

    def read(content: bytes) -> None:
        (folder / name).write_bytes(content)
        entry.update(bytes=len(content), sha256=sha256(content).hexdigest())
        (folder / MANIFEST).write_bytes(encode_manifest(manifest))
        use()

    fuzz(pytestconfig, [good], read, damage=damaged_part, num_inputs=25)


@pytest.mark.slow
def test_note_of_the_last_checkpoint(config: TrainConfig, folder: Path, pytestconfig: pytest.Config) -> None:
    file = Path(config.run.directory) / HISTORY
    shutil.rmtree(folder)

    def read(content: bytes) -> None:
        file.write_bytes(content)
        with pytest.raises(REFUSALS, match="has no checkpoint, but the run in"):
            newest_to_resume(config, fetch=False)

    fuzz(pytestconfig, [file.read_bytes()], read)


def test_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setattr(lease, "STALE_S", 0.0)
    monkeypatch.setattr(lease, "_POLL_S", 0.0)
    from trainer.checkpoint.lease_places import LEASE, claim_folder

    def read(content: bytes) -> None:
        (tmp_path / LEASE).write_bytes(content)
        claim_folder(str(tmp_path), "ours").release()
        assert not (tmp_path / LEASE).exists()

    good = lease.Holder("their launch", "anotherboot 17 4711", "token", "node7", 17, "2026-11-24T05:00:00Z")
    fuzz(pytestconfig, [good.encode()], read, num_inputs=100)
    fuzz(
        pytestconfig,
        [json.loads(good.encode())],
        lambda values: read(json.dumps(values).encode()),
        damage=altered,
        num_inputs=100,
    )


def test_checkpoint_of_a_good_manifest_is_used(use: Callable[[], None], config: TrainConfig) -> None:
    use()
    assert isinstance(newest_to_resume(config, fetch=True), Checkpoint)
