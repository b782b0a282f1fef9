"""What everything around the step costs, measured on the whole of it."""

import json

import pytest

from trainer.overhead_bench import main


def arguments(tiny: tuple[str, ...], *more: str) -> list[str]:
    settings = [s for s in tiny if not s.startswith(("tracking.", "checkpoint."))]
    return ["--config", "digits", *(word for setting in (*settings, *more) for word in ("--set", setting))]


@pytest.mark.slow
@pytest.mark.ray
def test_bare_and_whole_runs_are_compared_round_by_round(tiny, capsys):
    assert main([*arguments(tiny), "--steps", "20", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["overhead"] == found["whole_step_s"] / found["bare_step_s"] - 1
    assert 0 < found["bare_step_s"] < 10
    assert 0 < found["whole_step_s"] < 10


def test_missing_data_are_refused_in_words(tiny, tmp_path, capsys):
    assert main(arguments(tiny, f"data.path={tmp_path / 'none'}")) == 2
    assert "no prepared data set" in capsys.readouterr().err


def test_a_run_that_fails_is_told_with_its_last_words(tiny, tmp_path, capsys):
    assert main([*arguments(tiny, "scaling.device=gpu"), "--rounds", "1"]) == 2
    assert "scaling.device is gpu" in capsys.readouterr().err
