"""The updates of a step: made anew in each, or recorded and replayed where nothing but tensors changes."""

from collections.abc import Sequence
from typing import Any

from trainer.algorithm.method import Method, Part, Players
from trainer.algorithm.pairs import RawBatch
from trainer.algorithm.statistics import Statistics
from trainer.rank.step.graphs import Recorder, Repeated


class Updates:
    """Makes the updates of each step, one network after the other.

    With a recorder, an update with its draws is one piece of work: what a method takes from a step is in tensors, but
    for the numbers of `Method.at` and the engine's. Steps in which these change, and updates with penalties, are not
    recorded.
    """

    def __init__(self, players: Players, recorder: Recorder | None = None) -> None:
        """Start without a step.

        Args:
            players: the networks.
            recorder: records updates; None: each is made anew.
        """
        self._players = players
        self._repeated: dict[Part, Repeated[Statistics]] = {}
        if recorder is not None:
            self._repeated = {part: Repeated(recorder) for part in players.engines}
        self._drawn: list[Any] = []

    def begin(self, method: Method[Any], raw: Sequence[RawBatch]) -> None:
        """Begin a step.

        Args:
            method: with the numbers of the step, from `Method.at`.
            raw: the micro-batches to draw from, the same objects in each step.
        """
        self._method, self._raw = method, raw
        self._drawn = [] if self._repeated else self._draw(method)

    def make(self, part: Part) -> Statistics:
        """One update of a network, as `Method.update`; the next step may write into the tensors of the result."""
        if not self._repeated:
            return self._method.update(part, self._players, self._drawn)
        # The update of G is the same with and without penalties, which are of D.
        method = self._method if part == "d" else self._method.without_penalties()
        numbers = None if method.penalties else (method, self._players.engines[part].numbers())
        return self._repeated[part](lambda: method.update(part, self._players, self._draw(method)), numbers)

    def _draw(self, method: Method[Any]) -> list[Any]:
        return [method.draw(batch, self._players.diffusion) for batch in self._raw]
