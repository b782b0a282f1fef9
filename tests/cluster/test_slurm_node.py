"""How a task of a Slurm job ends when a signal comes while Ray starts."""

import signal

import pytest

from cluster.slurm import node
from cluster.slurm.ray_node import RayStartError
from trainer.run import STOPPED


@pytest.mark.parametrize(
    ("seen", "rank", "code"),
    [
        (set(), 0, 1),
        ({signal.SIGTERM}, 0, STOPPED),
        ({signal.SIGINT}, 0, node.STOPPED_BY_USER),
        ({signal.SIGTERM}, 1, 0),
        (set(), 1, 1),
    ],
)
def test_ray_start_that_slurm_ends_is_a_stop_and_no_failure(monkeypatch, tmp_path, capsys, seen, rank, code):
    class Stops:
        def __init__(self) -> None:
            self.seen = seen

    def start(*_: object) -> int:
        raise RayStartError("ray start on n1 ended with -15")

    monkeypatch.setenv("SLURM_PROCID", str(rank))
    monkeypatch.setenv("DDGAN_JOB_FOLDER", str(tmp_path))
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(node, "Stops", Stops)
    monkeypatch.setattr(node, "start_logging", lambda rank: None)
    monkeypatch.setattr(node, "lead" if rank == 0 else "follow", start)
    assert node.main([]) == code
    assert (tmp_path / "end").exists() == (rank == 0)
    assert ("ended with -15" in capsys.readouterr().err) == (code == 1)
