"""Time that passes only where a test says so."""


class MadeTime:
    """A clock that only sleeping and reading move."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
