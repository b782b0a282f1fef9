"""Every pair of nodes is measured once, and a pair that cannot talk is told from one that can."""

import socket
import threading
from itertools import combinations

import pytest

from cluster.pair_check import rounds
from tests.launch import run_python


@pytest.mark.parametrize("number", range(2, 12))
def test_every_pair_comes_once_and_no_node_twice_in_a_round(number):
    seen = list(rounds(number))
    assert sorted(pair for pairs in seen for pair in pairs) == list(combinations(range(number), 2))
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in seen)
    assert len(seen) == number - (number % 2 == 0)  # the fewest possible


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def side(rank: int, port: int, timeout_s: float) -> list[str]:
    call = f"all_reduce({rank}, '127.0.0.1', {port}, device='cpu', timeout_s={timeout_s})"
    return ["-c", f"from cluster.pair_check import all_reduce; print({call})"]


@pytest.mark.slow
@pytest.mark.multirank
def test_two_that_can_talk_get_a_rate():
    port, results = free_port(), {}
    threads = [
        threading.Thread(target=lambda rank=rank: results.update({rank: run_python(side(rank, port, 60))}))
        for rank in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[rank].returncode for rank in (0, 1)] == [0, 0], results
    assert all(float(results[rank].stdout) > 1e6 for rank in (0, 1))  # bytes a second; more than a modem


@pytest.mark.slow
def test_one_that_nobody_answers_fails_in_time():
    done = run_python(side(1, free_port(), 3), timeout_s=60)
    assert done.returncode == 1
    assert "DistNetworkError" in done.stderr or "timed out" in done.stderr.lower()
