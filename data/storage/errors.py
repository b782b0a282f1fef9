"""Expected errors of a command: each ends it with one message on stderr and an exit code.

0: done; 1: failed; 2: wrong user input; 75: stopped on request, the same command resumes; 130: interrupted. Any other
exception is a bug in the program and keeps its traceback.
"""

import errno
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from data.storage.redaction import escaped, redact
from data.storage.surroundings import prepare_process

P = ParamSpec("P")


class UserError(ValueError):
    """User input cannot be used; the message says what is wrong, what is allowed and what to do.

    Secrets in URLs that the message quotes are redacted, and control characters escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escaped(redact(message), keep_lines=True))


class OperationError(RuntimeError):
    """The user input is valid, but the work failed; the message says why.

    Secrets in it are redacted, and control characters escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escaped(redact(message), keep_lines=True))


class StoppedError(Exception):
    """The work was stopped on request; the message says what to do next.

    Attributes:
        exit_code: of the command.
    """

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def as_command(
    *, name: str = "", failed: int = 1, interrupted: str = ""
) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorate a function that returns an exit code: turn its expected errors into a message and an exit code.

    Args:
        name: prefix of each message.
        failed: exit code for `OperationError` and `OSError`; 2 if the command only reads what the user names.
        interrupted: message after Ctrl-C.
    """

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            prepare_process()
            try:
                return main(*args, **kwargs)
            except UserError as error:
                code, message = 2, str(error)
            except (OperationError, OSError) as error:
                code, message = failed, _said(error)
            except StoppedError as error:
                code, message = error.exit_code, str(error)
            except KeyboardInterrupt:
                code, message = 130, interrupted
            if message:
                sys.stderr.write(f"{name}: {message}\n" if name else f"{message}\n")
            return code

        return run

    return decorate


def _said(error: Exception) -> str:
    """The text of an error; that of the system says where it was."""
    if not isinstance(error, OSError) or error.strerror is None or not isinstance(error.filename, str):
        return str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{error.filename}: {error.strerror}{'; free some space, or choose another place' if full else ''}"
