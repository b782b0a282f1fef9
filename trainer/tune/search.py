"""One setting after the other, from the largest expected gain on, keeping the best so far."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from trainer.bench.trial import Outcome
from trainer.config.draft import ConfigError
from trainer.config.io import flat
from trainer.config.train_config import TrainConfig, split_batch
from trainer.tune.candidates import CANDIDATES, Candidate, Machine, Settings, proposals

MIN_GAIN = 1.02
"""A setting is kept if it is faster by this factor; the speed of one setting varies about as much."""


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        settings: what differs from the config as given.
        config: with these settings.
        outcome: of the measurement.
        is_best: whether it is the best so far.
    """

    settings: Settings
    config: TrainConfig
    outcome: Outcome
    is_best: bool = False

    @property
    def images_per_s(self) -> float:
        """What was measured, 0 if the trial failed."""
        return self.outcome.report["images_per_s"] if self.outcome.report else 0.0


@dataclass
class Search:
    """The search from one config.

    Attributes:
        load: the config as given with other values of some settings; ConfigError if they do not fit together.
        measure: runs a trial, given the seconds that it may take.
        machine: what there is to choose from.
        time_left: seconds left of the search.
        longest_trial_s: seconds after which a trial is given up.
        candidates: what is tried.
    """

    load: Callable[[Settings], TrainConfig]
    measure: Callable[[TrainConfig, Settings, float], Outcome]
    machine: Machine
    time_left: Callable[[], float]
    longest_trial_s: float
    candidates: Sequence[Candidate] = CANDIDATES
    best: Row | None = None
    _tried: set[frozenset[tuple[str, object]]] = field(default_factory=set)
    _shortest_s: float = 0.0

    def rows(self) -> Iterator[Row]:
        """Each trial when it has ended. The first is the config as given."""
        yield from self._start()
        better = self.best is not None
        while better:  # a second round finds what only the new settings allow, such as a larger micro-batch
            before = self.best
            for candidate in self.candidates:
                yield from self._try_all(candidate)
            better = self.best is not before

    def _start(self) -> Iterator[Row]:
        """The config as given; if it needs too much memory, with smaller micro-batches."""
        settings: Settings = {}
        while (row := self._attempt(settings)) is not None:
            yield row
            split = split_batch(row.config)
            smaller = split.micro_batch_size // 2 // split.group_size * split.group_size
            if not row.outcome.out_of_memory or not smaller:
                return
            settings = {"training.micro_batch_size": smaller}

    def _try_all(self, candidate: Candidate) -> Iterator[Row]:
        assert self.best is not None and self.best.outcome.report is not None
        for proposal in proposals(self.best.config, self.machine, self.best.outcome.report, candidate):
            if (row := self._attempt({**self.best.settings, **proposal})) is not None:
                yield row

    def _attempt(self, settings: Settings) -> Row | None:
        """Measure; None if there is no time, the settings do not fit together, or they have been measured."""
        try:
            config = self.load(settings)
        except ConfigError:
            return None
        given = flat(self.load({}))
        settings = {name: value for name, value in settings.items() if value != given[name]}
        key = frozenset(flat(config).items())
        left = self.time_left()
        if key in self._tried or left < max(self._shortest_s, 1.0):
            return None
        self._tried.add(key)
        outcome = self.measure(config, settings, min(left, self.longest_trial_s))
        row = Row(settings, config, outcome)
        if outcome.report is not None:
            self._shortest_s = min(self._shortest_s or outcome.seconds, outcome.seconds)
            if self.best is None or row.images_per_s > MIN_GAIN * self.best.images_per_s:
                self.best = row = Row(settings, config, outcome, is_best=True)
        return row
