"""The Ray that runs take place on: which lines of its processes reach the terminal."""

import pytest

from trainer.driver.connection import without_ray_internals

PREEMPTION = (
    "[2026-11-28 08:25:48,839 E 21460 21573] core_worker.cc:2465: Actor with class name: 'PreemptionWatcher' and ID: "
    "'54ba19becb4d12edc93aa27b01000000' has constructor arguments in the object store and max_restarts > 0."
)


@pytest.mark.parametrize(
    "line",
    [
        PREEMPTION,
        "[2026-11-28 08:25:48,839 W 1 2] (raylet) node_manager.cc:12: a worker is slow",
        "(python-core-worker) [2026-11-28 08:25:48,839 I 1 2] actor_manager.cc:218: received notification",
        "[state-dump] NumActors: 3",
        "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot, check ...",
        "[2026-11-28 08:25:48,839 I 1 2] (raylet) node_manager.cc:12: [state-dump] Event stats:",
        "WARNING: 8 PYTHON worker processes have been started on node: 2d33 with address: 10.0.0.1, which is 4x ...",
    ],
)
def test_log_line_of_rays_own_code_is_left_out(line):
    assert without_ray_internals([line, "after it"]) == ["after it"]


@pytest.mark.parametrize(
    "line",
    [
        "08:29:57 rank 0 INFO resuming from /runs/a/checkpoints/step-00000010",
        "Traceback (most recent call last):",
        '  File "trainer/rank/worker.py", line 3, in run',
        "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711",
        "[rank1]:[E1128 08:29:57.1 ProcessGroupNCCL.cpp:607] Watchdog caught collective operation timeout",
        "terminate called after throwing an instance of 'c10::Error'",
        "[2026-11-28 08:25:48,839 C 1 2] (raylet) node_manager.cc:12: Check failed: a fatal error ends its process",
        "",
    ],
)
def test_all_else_that_a_rank_prints_is_shown(line):
    assert without_ray_internals([PREEMPTION, line]) == [line]
