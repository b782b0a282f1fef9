"""A run with fewer ranks than it could have looks for room, but does not ask for what came to nothing."""

from trainer.growth import CHECK_INTERVAL_S, Growth


class Cluster:
    """A clock, and a number of ranks that find room."""

    def __init__(self) -> None:
        self.time_s, self.places = 100.0, 1
        self.growth = Growth(lambda _: self.places, clock=lambda: self.time_s)

    def after(self, intervals: float, world_size: int | None) -> int | None:
        self.time_s += intervals * CHECK_INTERVAL_S
        return self.growth.possible(world_size)


def test_room_is_used_once_it_is_there_and_not_looked_for_more_often() -> None:
    cluster = Cluster()
    assert cluster.after(1.1, 1) is None
    cluster.places = 3
    assert cluster.after(0.5, 1) is None
    assert cluster.after(0.6, None) is None  # between two groups
    assert cluster.after(0.1, 1) == 3
    assert cluster.after(1.1, 3) is None


def test_room_that_came_to_nothing_is_not_tried_again_until_it_has_changed() -> None:
    cluster = Cluster()
    cluster.places = 2
    assert cluster.after(1.1, 1) == 2
    assert cluster.after(1.1, 1) is None
    cluster.places = 1
    assert cluster.after(1.1, 1) is None
    cluster.places = 2
    assert cluster.after(1.1, 1) == 2
    cluster.places = 3
    assert cluster.after(1.1, 1) == 3
