"""A run that its cluster cannot hold is refused; one that lost a host says what it waits for, and seldom."""

from typing import Any

import pytest

from trainer.config.sections import ScalingConfig
from trainer.driver.room import LOOK_INTERVAL_S, REPEAT_S, TELL_AFTER_S, ClusterError, Waiting, check_room

CPUS = ScalingConfig(world_size=2, device="cpu", cpus_per_worker=4)


def node(number: int, *, is_alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeManagerAddress": f"10.0.0.{number}", "Alive": is_alive, "Resources": resources if is_alive else {}}


class Run:
    """A run of two ranks on two nodes, looked at every half second."""

    def __init__(self, scaling: ScalingConfig = CPUS) -> None:
        self.nodes, self.time_s, self.looks = [node(1, CPU=4), node(2, CPU=4)], 0.0, 0
        self.waiting = Waiting(self._list, scaling, clock=lambda: self.time_s, wall_clock=lambda: f"{self.time_s:g} s")

    def _list(self) -> list[dict[str, Any]]:
        self.looks += 1
        return self.nodes

    def told_within(self, seconds: float) -> list[str]:
        told = []
        for _ in range(int(2 * seconds)):
            self.time_s += 0.5
            told += [line for line in [self.waiting.news()] if line]
        return told


def test_a_lost_host_is_told_once_with_what_is_missing_and_since_when_and_then_rarely() -> None:
    run = Run()
    assert run.told_within(100) == []
    run.nodes = [node(1, CPU=4), node(2, is_alive=False)]
    (line,) = run.told_within(REPEAT_S)
    assert line == (
        "waiting since 105 s for 2 ranks: the cluster has 4 CPUs and 0 GPUs on 1 nodes, room for 1 ranks of 4 CPUs "
        "each; lost: 10.0.0.2. The run resumes from its last checkpoint when there is room; Ctrl-C ends it"
    )
    assert len(run.told_within(REPEAT_S)) == 1
    run.nodes = [node(1, CPU=4), node(3, CPU=4)]
    assert run.told_within(REPEAT_S) == [
        "the cluster has 8 CPUs and 0 GPUs on 2 nodes, room for 2 ranks of 4 CPUs each: the run can continue"
    ]
    assert run.looks <= run.time_s / LOOK_INTERVAL_S + 1


def test_a_host_that_is_back_at_once_and_a_run_that_can_shrink_are_no_news() -> None:
    elastic = ScalingConfig(world_size=2, min_world_size=1, device="cpu", cpus_per_worker=4)
    for run, seconds in ((Run(), TELL_AFTER_S), (Run(elastic), 5000)):
        run.nodes = [node(1, CPU=4)]
        assert run.told_within(seconds) == []
        run.nodes = [node(1, CPU=4), node(2, CPU=4)]
        assert run.told_within(REPEAT_S) == []


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        (ScalingConfig(world_size=2, device="cpu", cpus_per_worker=5), "room for 0 ranks of 5 CPUs each; the run asks"),
        (ScalingConfig(world_size=1, device="gpu"), "and 1 GPU each; the run asks for scaling.world_size 1"),
        (ScalingConfig(world_size=9, min_world_size=3, device="cpu", cpus_per_worker=4), "scaling.min_world_size 3"),
    ],
)
def test_more_ranks_than_there_is_room_for_are_refused(scaling: ScalingConfig, told: str) -> None:
    with pytest.raises(ClusterError, match=told):
        check_room([node(1, CPU=4), node(2, CPU=4), node(3, is_alive=False)], scaling)
