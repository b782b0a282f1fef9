"""How tests are shared out between two processes: one has all that start clusters, the other one goes file by file.

Clusters take half of the time, mostly waiting, and would disturb each other.
"""

import pytest
from xdist.scheduler import LoadScopeScheduling

CLUSTERS = tuple(
    f"tests/integration/test_{name}.py"
    for name in ("open_ports", "ray", "ray_failures", "rayjob", "slurm", "two_hosts")
)


def by_schedule(item: pytest.Item) -> bool:
    """Key to sort by: what takes longest begins first."""
    return item.nodeid.partition("::")[0] not in CLUSTERS


class Schedule(LoadScopeScheduling):
    """Work that stays in one process: a file, or all of `CLUSTERS`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "clusters" if file in CLUSTERS else file
