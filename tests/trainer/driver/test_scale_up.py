"""A run with fewer ranks than it could have looks for room, waits until it lasts, and seldom asks in vain."""

from itertools import pairwise

from trainer.driver.scale_up import CHECK_INTERVAL_S, FIRST_PAUSE_S, LONGEST_PAUSE_S, SETTLED_S, ScaleUp


class Cluster:
    """A clock, and a number of ranks that find room."""

    def __init__(self, places: int) -> None:
        self.time_s, self.places, self.looks = 100.0, places, 0
        self.scale_up = ScaleUp(self._look, clock=lambda: self.time_s)

    def _look(self, world_size: int) -> int:
        self.looks += 1
        return self.places

    def asked_at(self, seconds: float, world_size: int | None) -> list[float]:
        """When the run is asked to grow within so many seconds, looked at every half second; seconds from now."""
        began, asked = self.time_s, []
        while self.time_s < began + seconds:
            self.time_s += 0.5
            if ranks := self.scale_up.possible(world_size):
                assert ranks == self.places
                asked.append(self.time_s - began)
        return asked


def test_room_is_used_once_it_has_lasted_and_not_looked_for_more_often_than_it_must() -> None:
    cluster = Cluster(places=1)
    assert cluster.asked_at(3 * CHECK_INTERVAL_S, 1) == []
    assert cluster.looks == 3
    cluster.places = 3
    (asked,) = cluster.asked_at(SETTLED_S + 2 * CHECK_INTERVAL_S, 1)
    assert SETTLED_S < asked <= SETTLED_S + CHECK_INTERVAL_S
    assert cluster.asked_at(10 * SETTLED_S, 3) == []


def test_room_that_comes_and_goes_is_left_alone() -> None:
    cluster = Cluster(places=1)
    for _ in range(5):
        cluster.places = 2
        assert cluster.asked_at(SETTLED_S - CHECK_INTERVAL_S, 1) == []
        cluster.places = 1
        assert cluster.asked_at(CHECK_INTERVAL_S + 1, 1) == []


def test_nothing_is_looked_for_between_two_groups() -> None:
    cluster = Cluster(places=2)
    assert cluster.asked_at(10 * SETTLED_S, None) == []
    assert cluster.looks == 0


def test_room_that_came_to_nothing_is_tried_again_after_growing_pauses() -> None:
    cluster = Cluster(places=2)
    asked = cluster.asked_at(4000, 1)
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert FIRST_PAUSE_S <= pauses[0] <= FIRST_PAUSE_S + CHECK_INTERVAL_S
    assert pauses == sorted(pauses)
    assert LONGEST_PAUSE_S <= pauses[-1] <= LONGEST_PAUSE_S + CHECK_INTERVAL_S
