"""Notice that the cluster takes back a node of a run, such as a spot instance. Nothing here needs Ray.

Ray Train's answer to whether a node is being taken back waits until all ranks have asked the same number of times. So
each rank asks in a thread of its own, and training does not wait.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

PAUSE_S = 1.0
"""Between two questions; Ray itself looks every 5 s."""


class PreemptionNotice:
    """Whether a node of the run is being taken back; asks from now on."""

    def __init__(self, ask: Callable[[], Any], *, pause_s: float = PAUSE_S) -> None:
        """Args:
        ask: `ray.train.get_preemption_info`.
        pause_s: between two questions, in s.
        """
        self._ask, self._pause_s = ask, pause_s
        self._given = threading.Event()
        threading.Thread(target=self._watch, name="preemption-notice", daemon=True).start()

    @property
    def given(self) -> bool:
        """Whether there is a notice. It does not go away: the next group of ranks begins with a new one."""
        return self._given.is_set()

    def _watch(self) -> None:
        try:
            while (info := self._ask()) is None:
                time.sleep(self._pause_s)
        except Exception as error:  # another rank has ended, and with it this group
            log.debug("no more notices of lost nodes: %s", error)
            return
        left = "" if info.deadline_ms is None else f" in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s"
        log.info(
            "the nodes of ranks %s are taken back%s: saving a checkpoint, and going on elsewhere",
            ", ".join(map(str, info.preempted_ranks)),
            left,
        )
        self._given.set()
