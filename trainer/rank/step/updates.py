"""The updates of a step: made anew in each, or recorded and replayed where nothing but tensors changes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from trainer.algorithm.method import Method, Part, Players
from trainer.algorithm.pairs import RawBatch
from trainer.algorithm.statistics import Statistics
from trainer.rank.step.graphs import Recorder, Repeated

Update = Callable[[Part], Statistics]
"""Makes the update of a network, as `Method.update`; the next step may write into the tensors of the result."""


class Updates:
    """The updates of each step.

    With a recorder, the update of a network and its draws are one piece of work. What it takes from a step is in
    tensors, but for the numbers of `Method.at` and of the engine. While these change, and in steps with penalties, it
    is made anew.
    """

    def __init__(self, players: Players, recorder: Recorder | None = None) -> None:
        """Start without a recording.

        Args:
            players: the networks.
            recorder: records updates; None: each is made anew.
        """
        self._players = players
        self._repeated: dict[Part, Repeated[Statistics]] = {}
        if recorder is not None:
            self._repeated = {part: Repeated(recorder) for part in players.engines}

    def of_step(self, method: Method[Any], step: int, raw: Sequence[RawBatch]) -> Update:
        """The updates of one step, to be made in the order of the method's parts.

        Args:
            method: of the run.
            step: of the run, from 0.
            raw: the micro-batches to draw from, the same objects in each step.
        """
        if self._repeated:
            return partial(self._repeat, method, step, raw)
        now = method.at(step)
        drawn = self._draw(now, raw)
        return lambda part: now.update(part, self._players, drawn)

    def _repeat(self, method: Method[Any], step: int, raw: Sequence[RawBatch], part: Part) -> Statistics:
        now = method.at(step, part)
        numbers = None if now.penalties else (now, self._players.engines[part].numbers())
        return self._repeated[part](lambda: now.update(part, self._players, self._draw(now, raw)), numbers)

    def _draw(self, method: Method[Any], raw: Sequence[RawBatch]) -> list[Any]:
        return [method.draw(batch, self._players.diffusion) for batch in raw]
