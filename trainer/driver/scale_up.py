"""Decides when a run that lost ranks should add new ones."""

import time
from collections.abc import Callable

CHECK_INTERVAL_S = 10.0
SETTLED_S = 30.0
"""How long there must have been room. Ray Train itself checks the nodes every 20 seconds and cannot use nodes it does
not know of yet."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 60.0, 600.0
"""Pause after an attempt that failed to get the room; it doubles each time."""


class ScaleUp:
    """Checks periodically whether the cluster has room for more ranks than the run has."""

    def __init__(self, count_ranks: Callable[[int], int], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
        count_ranks: maps the number of running ranks to the number that could run now.
        clock: monotonic time in seconds.
        """
        self._count_ranks, self._clock = count_ranks, clock
        self._looked_at = clock()
        self._room_since: float | None = None
        self._tried_at = float("-inf")
        self._pause_s = 0.0

    def possible(self, world_size: int | None) -> int | None:
        """The number of ranks with which the run should continue. Call it often.

        Args:
            world_size: running ranks; None between two groups.

        Returns:
            The new number of ranks, or None to change nothing. If others took the room before the run got it, the next
            attempt comes after a pause.
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
