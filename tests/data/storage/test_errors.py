"""How commands end: the exit code and the message of each kind of error."""

import errno
import importlib
import os

import pytest

from data.storage.errors import OperationError, StoppedError, UserError, as_command
from data.storage.location import DataError
from trainer.checkpoint.format import CheckpointError
from trainer.checkpoint.lease import LeaseError
from trainer.checkpoint.snapshot import WeightsError

COMMANDS = (
    *(f"trainer.{name}" for name in ("run", "worker", "ablation", "modes", "points", "verify_resume")),
    *(f"trainer.{name}.command" for name in ("sample", "evaluate", "checkpoint", "bench")),
    *("data.bench", "data.prepare.command", "cluster.launch", "cluster.preflight", "cluster.slurm.node"),
)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("--num is 0"), 2, "--num is 0\n"),
        (DataError("no data"), 2, "no data\n"),
        (WeightsError("no weights"), 2, "no weights\n"),
        (LeaseError(["held by one", "since then"]), 2, "held by one\nsince then\n"),
        (OperationError("gone"), 1, "gone\n"),
        (CheckpointError("damaged"), 1, "damaged\n"),
        (OSError(errno.EIO, "Input/output error", "/a"), 1, "/a: Input/output error\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/a"),
            1,
            "/a: No space left on device; free some space, or choose another place\n",
        ),
        (StoppedError("saved", os.EX_TEMPFAIL), 75, "saved\n"),
        (StoppedError("at once"), 130, "at once\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_error_becomes_a_message_and_an_exit_code(error, code, message, capsys):
    @as_command()
    def main() -> int:
        raise error

    assert main() == code
    assert capsys.readouterr().err == message


def test_command_that_only_reads_has_its_name_and_words_of_its_own(capsys):
    @as_command(name="trainer.x", failed=2, interrupted="again, please")
    def main(error: BaseException | None) -> int:
        if error:
            raise error
        return 7

    assert [main(e) for e in (OperationError("a"), OSError("b"), UserError("c"), KeyboardInterrupt(), None)] == [
        *(2, 2, 2, 130, 7)
    ]
    expected = ("a", "b", "c", "again, please")
    assert capsys.readouterr().err == "".join(f"trainer.x: {words}\n" for words in expected)


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("a bug"), SystemExit(3)])
def test_fault_of_the_program_keeps_its_traceback(error):
    @as_command()
    def main() -> int:
        raise error

    with pytest.raises(type(error)):
        main()


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_ends_by_these_rules(module):
    assert hasattr(importlib.import_module(module).main, "__wrapped__")
