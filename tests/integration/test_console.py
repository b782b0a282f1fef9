"""The whole output of a short run, of its samples and of their evaluation: nothing but what this program has to say."""

import re
from pathlib import Path

import pytest

from tests.launch import run_python, train_command

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RUN = [
    r"\(RayTrainWorker pid=\d+\) \d\d:\d\d:\d\d rank 0 INFO training on 2 ranks",
    r"\(RayTrainWorker pid=\d+\) \d\d:\d\d:\d\d rank 0 INFO training.precision auto is fp32 on the CPU",
    # On a busy machine.
    r"\(RayTrainWorker pid=\d+\) \d\d:\d\d:\d\d rank 0 WARNING \d+ records of the run are not at sqlite.* yet\. .*",
    r"\d\d:\d\d:\d\d rank 0 INFO checking the hashes of 2 files, .* GB",
    r"\d\d:\d\d:\d\d rank 0 INFO \d+ of 160 images  .*",
    r"finished: step 10, 160 images",
    r"(samples|checkpoint|snapshot) +/.*/step-00000010(\.png)?",
    r"mlflow +sqlite:////.*",
]
FIGURES = r"kernel distance|class score, like Inception's|precision|recall|density|coverage"
EVALUATION = [
    r"samples +64 images, from .*",
    r"reference +\d+ images, all of the data set",
    r"features +64 of a classifier trained on the data set \(seed 0\),",
    r" +right on .*% of \d+ held-out images",
    r"Fréchet distance to the reference +samples +noise +ratio",
    r" +[\d.]+ +[\d.]+ +[\d.]+",
    rf"({FIGURES}) +\S+",
    r"share of class +samples reference",
    r"\d +[\d.]+% +[\d.]+%",
    r"trainer\.evaluate: the picture is /\S+/b\.png",
    "",
]


def unknown(output: str, known: list[str]) -> list[str]:
    return [line for line in output.split("\n")[:-1] if not any(re.fullmatch(form, line) for form in known)]


def test_train_sample_and_evaluate_print_nothing_that_is_not_ours(tiny, tiny_digits, tmp_path):
    run = tmp_path / "run"
    trained = run_python(train_command("digits", tiny, run, "scaling.world_size=2", "tracking.backends=[mlflow]"))
    assert trained.returncode == 0, trained.stderr
    assert unknown(trained.stdout + trained.stderr, RUN) == []
    sampled = run_python(["-m", "trainer.sample", "--run", str(run), "--num", "4", "--out", str(tmp_path / "a.png")])
    assert (sampled.stdout, sampled.stderr) == (f"4 images: {tmp_path / 'a.png'}\n", "")
    options = ["--run", str(run), "--num", "64", "--reference", str(tiny_digits)]
    evaluated = run_python(["-m", "trainer.evaluate", *options, "--picture", str(tmp_path / "b.png")])
    assert evaluated.returncode == 0, evaluated.stderr
    assert (tmp_path / "b.png").stat().st_size > 10_000
    assert unknown(evaluated.stdout + evaluated.stderr, EVALUATION) == []


def test_error_of_a_rank_is_shown_with_its_traceback_and_where_the_logs_are(tiny, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "snapshots").touch()  # a folder of this name is made at the end of a run
    done = run_python(train_command("digits", tiny, run, "scaling.world_size=1", "scaling.max_failures=0"))
    assert done.returncode == 1, done.stderr
    assert "Traceback (most recent call last):" in done.stderr
    assert f"NotADirectoryError: [Errno 20] Not a directory: '{run}/snapshots/step-00000010'" in done.stderr
    *_, failure, logs, advice = done.stderr.splitlines()
    assert "more often than scaling.max_failures (0) allows; the last time after step 10 with: rank 0: " in failure
    assert advice == "To resume from the last checkpoint, give the same command again."
    folder = Path(logs.removeprefix("Ray's logs of all processes are in "))
    assert list(folder.glob("worker-*.err"))
