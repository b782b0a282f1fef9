"""The end of a process that used Ray."""

import atexit
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with an exit code, after what was registered for its end, without tearing down its libraries.

    Threads of Ray's library outlive `ray.shutdown`. While the destructors of C++ run, one of them can crash on a busy
    machine, and a run that was stopped in order would end with 139.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
