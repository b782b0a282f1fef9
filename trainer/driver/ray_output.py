"""Selects which output of Ray's processes is shown on the driver's terminal.

The output of the ranks is shown. Log lines of Ray's own C++ code describe Ray's internal state and help only its
developers; errors that follow from it are also raised in Python. The driver itself says that a worker was killed. These
lines stay in Ray's log files.
"""

import re
from collections.abc import Iterable

# [2026-11-28 08:25:48,839 E 21460 21573] core_worker.cc:2465: ... Fatal errors (C) end their process and are shown.
_INTERNAL_LINE = re.compile(
    r"^(\([\w-]+\) )?\[[\d-]+ [\d:,]+ [DIWE] \d+ \d+\] (\([\w-]+\) )?\S+\.(cc|h):\d+: |\[state-dump\]"
    r"|^A worker died or was killed while executing a task"
    r"|^WARNING: \d+ PYTHON worker processes have been started on node"
)


def without_ray_internals(lines: Iterable[str]) -> list[str]:
    """The lines that are neither log lines of Ray's C++ code nor its notices of its own processes."""
    return [line for line in lines if not _INTERNAL_LINE.search(line)]
