"""Starts the real processes that tests need."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from trainer.checkpoint.format import list_checkpoints

ROOT = Path(__file__).resolve().parents[1]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: this checkout importable, one thread, no rank variables of a surrounding group."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in ranks}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(extra or {})}


def exit_code(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit code of a command that is called in this process, also if argparse ends it."""
    try:
        return main(arguments)
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        return ended.code


def run_python(
    arguments: Sequence[str],
    *,
    cwd: Path = ROOT,
    timeout_s: float = 300,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end, with its output as text."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment(env), capture_output=True, text=True, timeout=timeout_s
    )


def slow_steps(seconds: float, *, unless: Path | None = None) -> dict[str, str]:
    """Environment variables with which each optimizer step of a run waits, so that it lasts and hardly computes.

    Args:
        seconds: how long it waits.
        unless: it does not once this file exists.
    """
    fast = {} if unless is None else {"SLOW_STEPS_UNLESS": str(unless)}
    return {"PYTHONPATH": f"{ROOT}/tests/integration/slow_steps:{ROOT}", "SLOW_STEPS_S": str(seconds), **fast}


def run_torchrun(num_ranks: int, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run `torchrun ARGUMENTS` with real processes that communicate over gloo."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return run_python([*torchrun, *arguments])


def run_ranks(num_ranks: int, arguments: Sequence[str], *, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """The same with processes that are forked, torch and DeepSpeed loaded: each starts in a fraction of a second.

    Args:
        num_ranks: number of processes.
        arguments: as of `python`: a script, or `-m` and a module, and its own arguments.
        timeout_s: after this time all are killed, and the test fails.
    """
    starter = _rank_starter()
    assert starter.stdin
    assert starter.stdout
    with TemporaryDirectory() as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        out.touch()
        errors.touch()
        asked = {"ranks": num_ranks, "arguments": list(arguments), "out": str(out), "errors": str(errors)}
        starter.stdin.write(json.dumps({**asked, "timeout_s": timeout_s, "environment": environment()}) + "\n")
        starter.stdin.flush()
        answer = json.loads(starter.stdout.readline())
        assert "code" in answer, f"{answer}: {out.read_text()[-2000:]} {errors.read_text()[-3000:]}"
        return subprocess.CompletedProcess(arguments, answer["code"], out.read_text(), errors.read_text())


@cache
def _rank_starter() -> subprocess.Popen[str]:
    """The process that starts the ranks of all tests; it ends with this one, whose pipe it reads."""
    command = [sys.executable, "-m", "tests.trainer.engine.processes.rank_starter"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run_as_main(arguments: Sequence[str]) -> int:
    """Run a script or a module as `python ARGUMENTS` does; returns when it does, or raises SystemExit."""
    default_signals()
    os.chdir(ROOT)
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")
    return 0


def train_command(config: str, overrides: Sequence[str], directory: Path, *more: str) -> list[str]:
    """A `trainer.run` command with overrides."""
    overrides = [*overrides, f"run.directory={directory}", *more]
    return ["-m", "trainer.run", "--config", config, *(x for o in overrides for x in ("--set", o))]


def default_signals() -> None:
    """For a new process: a suite that was started in the background, or with nohup, inherits ignored signals."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def running(arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """A command in its own process group, as in a terminal; remaining processes are killed at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(env),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=default_signals,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for_checkpoint(directory: Path, process: subprocess.Popen, log: Path, *, after: int = 0) -> int:
    """Wait at most five minutes, while the process lives, for a checkpoint of a step beyond `after`; its step."""
    deadline = time.monotonic() + 300
    while True:
        steps = [checkpoint.step for checkpoint in list_checkpoints(directory / "checkpoints")]
        if steps and steps[-1] > after:
            return steps[-1]
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)


def wait_for_text(text: str, process: subprocess.Popen, log: Path) -> None:
    """Wait at most five minutes, while the process lives, until it has printed a text."""
    deadline = time.monotonic() + 300
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
