"""How a command ends that cannot do what was asked: one message on stderr, and an exit code.

0: done; 1: it failed; 2: something that the user gave is wrong; 75: stopped on request, the same command resumes; 130:
interrupted. Anything else that is raised is a fault of the program and keeps its traceback.
"""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from data.storage.redaction import redact

P = ParamSpec("P")


class UserError(ValueError):
    """Something that the user gave cannot be used; the message says what is wrong, what is allowed and what to do.

    It shows no secret: whatever URL the message quotes is redacted.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class OperationError(RuntimeError):
    """Nothing is wrong with what the user gave, but the work could not be done; the message says why.

    It shows no secret either.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class StoppedError(Exception):
    """The work ended early because somebody asked for it; the message says what follows.

    Attributes:
        exit_code: of the command.
    """

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def as_command(
    *, name: str = "", failed: int = 1, interrupted: str = ""
) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorate a function that returns an exit code: its expected errors become a message and an exit code as well.

    Args:
        name: said before each message.
        failed: exit code of `OperationError` and `OSError`; 2 where the command only reads what the user names.
        interrupted: message after Ctrl-C.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except UserError as error:
                code, message = 2, str(error)
            except (OperationError, OSError) as error:
                code, message = failed, str(error)
            except StoppedError as error:
                code, message = error.exit_code, str(error)
            except KeyboardInterrupt:
                code, message = 130, interrupted
            if message:
                sys.stderr.write(f"{name}: {message}\n" if name else f"{message}\n")
            return code

        return run

    return decorate
