"""Room for a run's ranks on the nodes of a cluster: what is missing, and how a user hears that a run waits for it.

Nothing here needs Ray; nodes are given as `ray.nodes()` lists them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data.storage.errors import UserError
from trainer.config.sections import ScalingConfig

LOOK_INTERVAL_S = 5.0
TELL_AFTER_S = 15.0
"""How long room must have been missing before it is told: a node that restarts at once is no news."""
REPEAT_S = 600.0
Node = Mapping[str, Any]


class ClusterError(UserError):
    """The cluster cannot run this config; says what is missing and what to do."""


def alive(nodes: Sequence[Node]) -> list[Node]:
    """The nodes that live."""
    return [node for node in nodes if node["Alive"]]


def places(nodes: Sequence[Node], scaling: ScalingConfig) -> int:
    """Number of ranks that fit on the living nodes; a rank needs all its resources on one node."""
    found = 0
    for resources in (node["Resources"] for node in alive(nodes)):
        fits = int(resources.get("CPU", 0)) // scaling.cpus_per_worker
        found += min(fits, int(resources.get("GPU", 0))) if scaling.device == "gpu" else fits
    return found


def fewest_ranks(scaling: ScalingConfig) -> int:
    """The fewest ranks with which the run may go."""
    return scaling.min_world_size or scaling.world_size


def check_room(nodes: Sequence[Node], scaling: ScalingConfig) -> None:
    """Refuse at once what Ray would wait for forever.

    Raises:
        ClusterError: the cluster has fewer CPUs or GPUs than the fewest allowed ranks need.
    """
    if places(nodes, scaling) >= fewest_ranks(scaling):
        return
    name = "scaling.min_world_size" if scaling.min_world_size else "scaling.world_size"
    raise ClusterError(
        f"the cluster has {_room(nodes, scaling)}; the run asks for {name} {fewest_ranks(scaling)}. Lower {name} or "
        "scaling.cpus_per_worker"
        + (", set scaling.device=cpu" if scaling.device == "gpu" else "")
        + ", or use a larger cluster"
    )


def _room(nodes: Sequence[Node], scaling: ScalingConfig) -> str:
    resources = [node["Resources"] for node in alive(nodes)]
    have = " and ".join(f"{sum(held.get(kind, 0) for held in resources):g} {kind}s" for kind in ("CPU", "GPU"))
    needed = f"{scaling.cpus_per_worker} CPUs" + (" and 1 GPU" if scaling.device == "gpu" else "")
    return f"{have} on {len(resources)} nodes, room for {places(nodes, scaling)} ranks of {needed} each"


class Waiting:
    """Notices that a run waits because its cluster has become too small, such as by the loss of a host.

    While the fewest allowed ranks do not fit on the living nodes, no group of ranks can be running.
    """

    def __init__(
        self,
        list_nodes: Callable[[], Sequence[Node]],
        scaling: ScalingConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], str] = lambda: time.strftime("%H:%M:%S"),
    ) -> None:
        """Start with the nodes of now.

        Args:
            list_nodes: the nodes, as `ray.nodes()` lists them.
            scaling: of the run.
            clock: monotonic time in seconds.
            wall_clock: the time of day, as text.
        """
        self._list_nodes, self._scaling, self._clock, self._wall_clock = list_nodes, scaling, clock, wall_clock
        self._known = {node["NodeManagerAddress"] for node in alive(list_nodes())}
        self._looked_at = clock()
        self._since: tuple[float, str] | None = None
        self._told_at: float | None = None

    @property
    def waits(self) -> bool:
        """Whether room was missing when the nodes were last looked at."""
        return self._since is not None

    def news(self) -> str | None:
        """A line for the user, or None: that the run waits, again from time to time, and that it need not any more.

        Call it often; it looks at the nodes every few seconds.
        """
        now = self._clock()
        if now - self._looked_at < LOOK_INTERVAL_S:
            return None
        self._looked_at = now
        nodes = self._list_nodes()
        living = {node["NodeManagerAddress"] for node in alive(nodes)}
        if places(nodes, self._scaling) >= fewest_ranks(self._scaling):
            told, self._since, self._told_at = self._told_at, None, None
            self._known |= living
            return None if told is None else f"the cluster has {_room(nodes, self._scaling)}: the run can continue"
        self._since = self._since or (now, self._wall_clock())
        if now - self._since[0] < TELL_AFTER_S or (self._told_at is not None and now - self._told_at < REPEAT_S):
            return None
        self._told_at = now
        lost = sorted(self._known - living)
        return (
            f"waiting since {self._since[1]} for {fewest_ranks(self._scaling)} ranks: the cluster has "
            f"{_room(nodes, self._scaling)}"
            + (f"; lost: {', '.join(lost)}" if lost else "")
            + ". The run resumes from its last checkpoint when there is room; Ctrl-C ends it"
        )
