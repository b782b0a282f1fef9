"""What is said of a cluster before any rank is started on it, and what is left out on a Ray of our own."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from tests.launch import run_python
from tests.trainer.runs import configure
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


@pytest.mark.slow
def test_local_run_has_no_dashboard_and_nothing_that_would_ask_it(monkeypatch):
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from trainer.driver import connection
    from trainer.driver.controller import Rendezvous, Trainer

    started: list[bool] = []

    def init(include_dashboard: bool, **_options: object) -> dict[str, str]:
        started.append(include_dashboard)
        return {"session_dir": "here"}

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(connection, "ray", SimpleNamespace(init=init, shutdown=lambda: None))
    for shared in (False, True):
        with connection.connected(shared=shared) as logs:
            assert logs == "here/logs"
    assert started == [False, True]

    policies: list[str] = []

    def start(_trainer: object, **parts: object) -> None:
        policies.append(type(parts["scaling_policy"]).__name__)

    monkeypatch.setattr(DataParallelTrainer, "_initialize_and_run_controller", start)
    for ends_with_run in (False, True):  # a cluster outlives the run
        trainer = Trainer(print, backend_config=Rendezvous(loads="os"), ends_with_run=ends_with_run)
        cleaners = [c for c in trainer._create_default_callbacks() if isinstance(c, PlacementGroupCleanerCallback)]
        assert len(cleaners) == (not ends_with_run)
        for policy in (FixedScalingPolicy, ElasticScalingPolicy):
            trainer._initialize_and_run_controller(scaling_policy=policy(trainer.scaling_config))
    elastic = "ElasticScalingPolicy"  # it asks the coordinator what is free
    assert policies == ["FixedScalingPolicy", elastic, "FixedHere", elastic]


@pytest.mark.slow
def test_the_controller_unpickles_no_config_and_imports_no_torch(tiny, tmp_path, monkeypatch):
    """Else it starts two seconds later, and so do the ranks."""
    from ray import cloudpickle

    from trainer.driver import ray_train

    monkeypatch.setattr(ray_train, "ray", SimpleNamespace(get=lambda count: count, train=ray_train.ray.train))
    state = SimpleNamespace(count_failures=SimpleNamespace(remote=lambda: 0))
    trainer = ray_train._make_trainer(configure(tiny, tmp_path / "run"), state)
    given = tmp_path / "given"
    given.write_bytes(cloudpickle.dumps((trainer.train_run_context, trainer._create_default_callbacks())))
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')); print([n for n in LARGE if n in sys.modules])"
    done = run_python(["-c", f"LARGE = 'torch', 'trainer.config.train_config'; {code}", str(given)])
    assert done.stdout == "[]\n", done.stderr
