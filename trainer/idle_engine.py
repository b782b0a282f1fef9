"""The engine of a network that an objective does without: no parameters, no update, nothing in a checkpoint."""

from collections.abc import Iterator

from torch import Tensor, nn

from trainer.engines import Fragment, FragmentSource
from trainer.guard import UpdateGuard


class IdleEngine:
    """Stands in the discriminator's place while the generator is trained by regression."""

    def __init__(self) -> None:
        self.module: nn.Module = nn.Module()
        self.guard = UpdateGuard(None, partitioned=False)

    def backward(self, loss: Tensor) -> None:
        """Never called: nothing here has a loss."""
        raise AssertionError("this objective has no discriminator")

    def step(self) -> None:
        """Never called either."""
        raise AssertionError("this objective has no discriminator")

    def num_updates(self) -> int:
        """None is ever made."""
        return 0

    def set_learning_rate(self, learning_rate: float) -> None:
        """There is nothing that learns."""

    def live_parameters(self) -> list[tuple[str, int, Tensor]]:
        """None."""
        return []

    def fragments(self) -> Iterator[Fragment]:
        """None."""
        return iter(())

    def load(self, source: FragmentSource, num_updates: int) -> None:
        """There is nothing to load."""

    def close(self) -> None:
        """There is nothing to release."""
