"""How tests are shared out between two processes: one has all that start clusters, the other one goes file by file.

Clusters take half of the time, mostly waiting, and would disturb each other.
"""

import re
from functools import cache
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parents[1]


@cache
def starts_clusters(file: str) -> bool:
    """Whether a file, named from the checkout, has tests with the mark `ray` or `slurm`."""
    return re.search(r"mark\.(ray|slurm)\b", (ROOT / file).read_text()) is not None


def by_schedule(item: pytest.Item) -> bool:
    """Key to sort by: what takes longest begins first."""
    return not starts_clusters(item.nodeid.partition("::")[0])


class Schedule(LoadScopeScheduling):
    """Work that stays in one process: a file, or all files that start clusters."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "clusters" if starts_clusters(file) else file
