"""When a run that lost ranks should take new ones."""

import time
from collections.abc import Callable

CHECK_INTERVAL_S = 10.0


class Growth:
    """Looks now and then whether the cluster has room for more ranks than the run has."""

    def __init__(self, count_ranks: Callable[[int], int], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Args:
        count_ranks: given the ranks that run, those that could run now.
        clock: seconds.
        """
        self._count_ranks, self._clock = count_ranks, clock
        self._looked_at = clock()
        self._came_to_nothing: int | None = None

    def possible(self, world_size: int | None) -> int | None:
        """Called often.

        Args:
            world_size: ranks that run; None between two groups.

        Returns:
            The ranks that the run should go on with, or None: as they are. A number that was tried and came to nothing,
            because others took that room, is not given again before the room has changed.
        """
        if world_size is None or self._clock() - self._looked_at < CHECK_INTERVAL_S:
            return None
        self._looked_at = self._clock()
        possible = self._count_ranks(world_size)
        if possible <= world_size:
            self._came_to_nothing = None
            return None
        if possible == self._came_to_nothing:
            return None
        self._came_to_nothing = possible
        return possible
