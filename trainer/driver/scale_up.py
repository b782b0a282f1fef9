"""When a run that lost ranks should take new ones."""

import time
from collections.abc import Callable

CHECK_INTERVAL_S = 10.0


SETTLED_S = 30.0
"""How long there must have been room. Ray Train itself looks at the nodes every 20 seconds: what it does not know of
yet, it does not use."""


FIRST_PAUSE_S, LONGEST_PAUSE_S = 60.0, 600.0
"""Until room that came to nothing is tried again; each time twice as long."""


class ScaleUp:
    """Looks now and then whether the cluster has room for more ranks than the run has."""

    def __init__(self, count_ranks: Callable[[int], int], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
        count_ranks: given the ranks that run, those that could run now.
        clock: seconds.
        """
        self._count_ranks, self._clock = count_ranks, clock
        self._looked_at = clock()
        self._room_since: float | None = None
        self._tried_at = float("-inf")
        self._pause_s = 0.0

    def possible(self, world_size: int | None) -> int | None:
        """Called often.

        Args:
            world_size: ranks that run; None between two groups.

        Returns:
            The ranks that the run should go on with, or None: as they are. Room that was tried and came to nothing,
            because others took it, is tried again after a pause.
        """
        now = self._clock()
        if world_size is None or now - self._looked_at < CHECK_INTERVAL_S:
            return None
        self._looked_at = now
        possible = self._count_ranks(world_size)
        if possible <= world_size:
            self._room_since, self._pause_s = None, 0.0
            return None
        self._room_since = now if self._room_since is None else self._room_since
        if now - self._room_since < SETTLED_S or now - self._tried_at < self._pause_s:
            return None
        self._tried_at = now
        self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
        return possible
