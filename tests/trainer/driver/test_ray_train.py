"""What is said of a cluster before any rank is started on it."""

from contextlib import nullcontext

import pytest

from trainer.run import main


@pytest.mark.slow
def test_too_few_cpus_are_said_at_once(tiny, tmp_path, monkeypatch, capsys):
    from trainer.driver import ray_train  # takes seconds

    monkeypatch.setattr(ray_train, "connected", nullcontext)
    monkeypatch.setattr(ray_train.ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}] * 2)
    sets = [*tiny, f"run.directory={tmp_path}/run", "scaling.world_size=4", "scaling.cpus_per_worker=64"]
    assert main(["--config", "digits", *(x for o in sets for x in ("--set", o))]) == 2
    told = capsys.readouterr().err
    assert "the cluster has 4 CPUs and 0 GPUs on 2 nodes, room for 0 ranks of 64 CPUs each" in told
    assert "the run asks for scaling.world_size 4. Lower scaling.world_size or scaling.cpus_per_worker" in told
    assert "Traceback" not in told
