"""Kills real processes inside their saves, and prints what each left: run by test_checkpoint_kills.

The program is imported once; every run is a fork of it, which ends itself by SIGKILL at the chosen point.
"""

import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch._dynamo  # noqa: F401 - each fork would import it in the first step of its optimizer

from tests.trainer.runs import Stopper, assert_same_state, configure, state_of
from trainer.checkpoint import storage as checkpoint_storage
from trainer.checkpoint.format import newest_valid
from trainer.checkpoint.storage import FolderStorage
from trainer.rank.worker import run_rank

PHASES = ("before the first byte", "inside a part", "before the manifest", "before its name", "inside prune")
SAVE_EVERY = 2


def kill_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(phase: str, save: int, fraction: float) -> None:
    """Have this process killed in its save number `save`, counted from 1."""
    seen = 0
    write, commit, replace, rmtree = FolderStorage.write, FolderStorage.commit, os.replace, shutil.rmtree

    def due() -> bool:
        return seen == save

    def counted(storage: FolderStorage, checkpoint: str, name: str, chunks: Iterable[memoryview]) -> None:
        nonlocal seen
        seen += 1
        if due() and phase == "before the first byte":
            kill_now()
        write(storage, checkpoint, name, cut(chunks) if due() and phase == "inside a part" else chunks)

    def cut(chunks: Iterable[memoryview]) -> Iterator[memoryview]:
        header, data, *_ = chunks
        yield header
        yield data[: int(fraction * len(data))]
        kill_now()

    def committed(storage: FolderStorage, checkpoint: str, manifest: bytes) -> None:
        if due() and phase == "before the manifest":
            kill_now()
        commit(storage, checkpoint, manifest)

    def renamed(source: Path, target: Path) -> None:
        if due() and phase == "before its name" and Path(target).name == "manifest.json":
            kill_now()
        replace(source, target)

    def removed(path: Path) -> None:
        if phase == "inside prune" and seen >= save and Path(path).name.startswith("step-"):
            if fraction > 0.5:
                next(Path(path).iterdir()).unlink()
            kill_now()
        rmtree(path)

    setattr(FolderStorage, "write", counted)  # noqa: B010
    setattr(FolderStorage, "commit", committed)  # noqa: B010
    setattr(checkpoint_storage.os, "replace", renamed)  # noqa: B010
    setattr(checkpoint_storage.shutil, "rmtree", removed)  # noqa: B010


def in_child(action: Callable[[], object]) -> int:
    """Exit code of a fork that does it; minus the signal's number if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    folder, first_seed, num_seeds, *tiny = sys.argv[1:]
    straight = configure(tiny, Path(folder) / "straight")
    assert in_child(lambda: run_rank(straight, Stopper())) == 0
    expected = state_of(Path(folder) / "straight", 10)
    for phase in PHASES:
        for seed in range(int(first_seed), int(first_seed) + int(num_seeds)):
            draws = random.Random(f"{phase} {seed}")
            save, fraction = draws.randint(2, 4), draws.random()
            directory = Path(folder) / f"{PHASES.index(phase)}-{seed}"
            more = (f"checkpoint.save_interval_steps={SAVE_EVERY}", "checkpoint.keep_last=1")
            config = configure(tiny, directory, *more)

            def killed(phase: str = phase, save: int = save, fraction: float = fraction, config=config) -> None:
                arm(phase, save, fraction)
                run_rank(config, Stopper())

            assert in_child(killed) == -signal.SIGKILL, phase
            found = newest_valid(directory / "checkpoints")
            steps = {SAVE_EVERY * save} if phase == "inside prune" else {SAVE_EVERY * (save - 1)}
            assert found is not None, f"{phase}, seed {seed}: nothing is left"
            assert found.step in steps, f"{phase}, seed {seed}: step {found.step} is left, expected {steps}"
            assert in_child(lambda config=config: run_rank(config, Stopper())) == 0
            assert_same_state(state_of(directory, 10), expected)
            left = sorted(path.name for path in (directory / "checkpoints").iterdir())
            assert left == ["step-00000010"], left
            sys.stdout.write(f"{phase}, seed {seed}: killed in save {save}, {found.step} was left\n")


if __name__ == "__main__":
    main()
