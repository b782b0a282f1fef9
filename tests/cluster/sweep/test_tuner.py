"""What Ray Tune is told, and what its decisions become; without a Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from cluster.sweep.combinations import SweepRun, make_runs, varied
from cluster.sweep.table import stopped_by_asha
from cluster.sweep.tuner import IMAGES, _scheduler, _Told, side_by_side
from trainer.driver.room import ClusterError

ASHA = ("evaluation.interval_images=3200", "checkpoint.save_interval_steps=100", "checkpoint.keep_best=fid")


def runs_in(folder: Path, *more: str) -> list[SweepRun]:
    sets = (f"run.directory={folder}", "data.path=/d", "training.global_batch_size=32", *more)
    return make_runs("digits", [], sets, [varied("run.seed=0-3")])


def test_asha_stops_the_run_with_the_worst_figure_and_none_before_a_ninth_of_its_length(tmp_path: Path) -> None:
    runs = runs_in(tmp_path, "training.total_images=32000", *ASHA)
    scheduler = _scheduler(runs, "fid")
    decisions = []
    for number, fid in enumerate((10.0, 20.0, 30.0, 40.0)):
        trial = Trial("run", config={"run": number}, stub=True)
        scheduler.on_trial_add(None, trial)
        early = scheduler.on_trial_result(None, trial, {IMAGES: 3200, "fid": fid, "training_iteration": 1})
        without = scheduler.on_trial_result(None, trial, {IMAGES: 3520, "training_iteration": 2})
        at_ninth = scheduler.on_trial_result(None, trial, {IMAGES: 3840, "fid": fid, "training_iteration": 3})
        assert {early, without} == {TrialScheduler.CONTINUE}
        decisions.append(at_ninth)
    assert decisions[0] == TrialScheduler.CONTINUE
    assert decisions[-1] == TrialScheduler.STOP


def test_asha_lets_a_run_close_that_has_come_to_its_end(tmp_path: Path) -> None:
    scheduler = _scheduler(runs_in(tmp_path, "training.total_images=32000", *ASHA), "fid")
    trial = Trial("run", config={"run": 0}, stub=True)
    scheduler.on_trial_add(None, trial)
    at_end = {IMAGES: 32000, "fid": 10.0, "training_iteration": 1}
    assert scheduler.on_trial_result(None, trial, at_end) == TrialScheduler.CONTINUE


def told(folder: Path, last_result: dict[str, Any]) -> tuple[list[SweepRun], _Told, list[str]]:
    runs, said = runs_in(folder, "training.total_images=32000", *ASHA), list[str]()
    listener = _Told(runs, "fid", said.append)
    for run in runs:
        run.directory.mkdir()
    listener.on_trial_complete(1, [], SimpleNamespace(config={"run": 2}, last_result=last_result))
    return runs, listener, said


def test_a_run_that_asha_stops_is_noted_in_its_folder(tmp_path: Path) -> None:
    runs, listener, said = told(tmp_path, {"code": None, "fid": 12.5, IMAGES: 3200})
    assert [stopped_by_asha(run) for run in runs] == [False, False, True, False]
    assert (listener.codes, said) == ({}, ["stopped seed-2 by ASHA: fid 12.5"])


@pytest.mark.parametrize(("code", "words"), [(0, "finished"), (75, "stopped"), (1, "FAILED"), (-9, "FAILED")])
def test_the_exit_code_of_a_run_is_told(tmp_path: Path, code: int, words: str) -> None:
    runs, listener, said = told(tmp_path, {"code": code, "fid": 12.5, IMAGES: 3200})
    assert listener.codes == {"seed-2": code}
    assert said[0].startswith(f"{words} seed-2")
    assert not any(map(stopped_by_asha, runs))


def test_as_many_runs_go_side_by_side_as_there_is_room_for(tmp_path: Path) -> None:
    runs = runs_in(tmp_path, "scaling.world_size=2")

    def nodes(*cpus: int) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(number)}} for number in cpus]

    assert [side_by_side(nodes(*cpus), runs) for cpus in ((2,), (3,), (4, 1), (8, 8))] == [1, 1, 2, 8]
    with pytest.raises(ClusterError, match="room for 1 ranks"):
        side_by_side(nodes(1), runs)
