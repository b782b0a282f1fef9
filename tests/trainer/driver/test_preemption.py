"""The notice of a node that is taken back."""

import threading
from types import SimpleNamespace

from trainer.driver.preemption import PreemptionNotice


def test_notice_is_given_when_a_node_is_taken_back_and_not_before():
    asked, taken_back = threading.Event(), threading.Event()

    def ask() -> SimpleNamespace | None:
        asked.set()
        return SimpleNamespace(deadline_ms=None, preempted_ranks=[1]) if taken_back.is_set() else None

    notice = PreemptionNotice(ask, pause_s=0.01)
    assert asked.wait(10) and not notice.given
    taken_back.set()
    assert notice._given.wait(10) and notice.given


def test_end_of_the_group_is_no_notice():
    ended = threading.Event()

    def ask() -> None:
        ended.set()
        raise RuntimeError("the group has ended")

    notice = PreemptionNotice(ask)
    assert ended.wait(10) and not notice.given
