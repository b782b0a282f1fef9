"""How a task of a Slurm job ends when a signal comes while Ray starts."""

import signal
from contextlib import nullcontext

import pytest

from cluster.slurm import node, ray_node
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


@pytest.mark.parametrize(
    ("said", "attempts"),
    [
        ([ray_node._OUT_OF_PATIENCE, None], 2),
        ([ray_node._OUT_OF_PATIENCE] * 3, 3),
        (["ended with -15"], 1),
    ],
)
def test_ray_is_started_again_where_its_patience_ran_out_and_only_there(monkeypatch, tmp_path, said, attempts):
    answers, started = iter(said), []

    def start(_self, options, environment):
        started.append(options)
        if error := next(answers):
            raise RayStartError(error)

    monkeypatch.setattr(ray_node.RayNode, "_start", start)
    node = ray_node.RayNode("127.0.0.1", cpus=1, gpus=0, token=tmp_path / "token", temporary=tmp_path)
    with nullcontext() if said[-1] is None else pytest.raises(RayStartError, match=said[-1]), node.head():
        pass
    assert len(started) == attempts
    assert all(options == started[0] for options in started)
    assert list(tmp_path.iterdir()) == []
