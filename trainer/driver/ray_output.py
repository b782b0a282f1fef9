"""Which lines of Ray's processes a user sees on the driver's terminal.

What the ranks print is passed on. Lines of Ray's own C++ code are about Ray's inner state, in words that only its
developers can use; whatever they lead to is raised in Python as well. They stay in Ray's log files.
"""

import re
from collections.abc import Iterable

# [2026-11-28 08:25:48,839 E 21460 21573] core_worker.cc:2465: ... A fatal error (C) ends its process: it is shown.
_CPP_LINE = re.compile(
    r"^(\([\w-]+\) )?\[[\d-]+ [\d:,]+ [DIWE] \d+ \d+\] (\([\w-]+\) )?\S+\.(cc|h):\d+: |\[state-dump\]"
)


def without_ray_internals(lines: Iterable[str]) -> list[str]:
    """The lines that are no log lines of Ray's C++ code."""
    return [line for line in lines if not _CPP_LINE.search(line)]
