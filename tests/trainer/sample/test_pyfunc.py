"""A snapshot in MLflow's registry: one version for a run, loaded without this checkout, with the pixels of a sample."""

import json
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import mlflow
import numpy as np
import pytest
from packaging.utils import canonicalize_name

from tests.launch import ROOT, run_python
from tests.trainer.refusals import refusals
from tests.trainer.runs import configure, train
from trainer.sample.command import main as sample
from trainer.tracking.mlflow_sink import MODEL_CODE, MODEL_NEEDS, MODEL_PACKAGES, MlflowSink
from trainer.tracking.spool import Record

LOAD = """
import json, sys
import mlflow.pyfunc, numpy, pandas
model = mlflow.pyfunc.load_model("models:/digits/1")
seeds = pandas.DataFrame({"seed": [7, 8, 9], "class": [4, 0, 4]})
numpy.savez(sys.argv[1], with_class=model.predict(seeds), in_turn=model.predict(seeds[["seed"]]))
import trainer
print(json.dumps(trainer.__file__))
"""


def drawn(run: Path, out: Path, *more: str) -> np.ndarray:
    assert sample(["--run", str(run), "--seeds", "7-9", *more, "--out", str(out)]) == 0
    return np.load(out)["images"]


@pytest.mark.slow
def test_registered_snapshot_draws_without_this_checkout_what_sample_draws(
    tiny: tuple[str, ...], tmp_path: Path
) -> None:
    run, database = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    train(configure(tiny, run, "training.learning_rate_g.peak=0.05", "data.num_classes=10"))
    (snapshot,) = (run / "snapshots").iterdir()
    sink = MlflowSink(database, run)
    opening = Record(kind="open", at=1, step=None, payload={"uid": "u", "run_name": "n"}, start=0, end=1)
    run_id, _ = sink.attach(opening, None)
    for _ in range(2):  # twice: a repeated delivery
        sink.register_model(snapshot, "digits")
    (version,) = mlflow.MlflowClient(database).search_model_versions("name='digits'")
    assert (version.run_id, version.tags) == (run_id, {"snapshot": snapshot.name})

    kept = Path(str(version.source).removeprefix("file://"))
    assert {file.name for file in kept.iterdir()} >= {"MLmodel", "code", "requirements.txt"}
    assert "python_model" not in (kept / "MLmodel").read_text()  # it would be a pickle
    assert {"models", "data", "trainer"} == set(MODEL_PACKAGES) == {file.name for file in (kept / "code").iterdir()}
    assert {file.suffix for file in kept.rglob("*") if file.is_file()} & {".pkl", ".pickle", ".pt", ".pth"} == set()

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "loaded.npz")],
        cwd=tmp_path,
        env=environment | {"MLFLOW_TRACKING_URI": database},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]).endswith(f"model-{snapshot.name}/code/trainer/__init__.py")
    loaded = np.load(tmp_path / "loaded.npz")
    assert loaded["with_class"].dtype == np.uint8
    assert np.array_equal(loaded["in_turn"], drawn(run, tmp_path / "a.npz"))
    assert np.array_equal(loaded["with_class"], drawn(run, tmp_path / "b.npz", "--classes", "4,0,4"))


@pytest.mark.slow
def test_requirements_of_a_registered_model_are_what_its_code_imports() -> None:
    code = f"import sys, {MODEL_CODE}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = set(run_python(["-c", code]).stdout.split())
    mine = {
        line.split()[1].partition(".")[0].rstrip(",")
        for name in loaded & set(MODEL_PACKAGES)
        for file in (ROOT / name).rglob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    providers = packages_distributions()
    needed = {canonicalize_name(name) for module in mine & loaded for name in providers.get(module, [])}
    assert needed - {"ddgan"} == set(MODEL_NEEDS)


def test_what_cannot_be_registered_is_refused() -> None:
    assert refusals(tracking={"register_as": "a/b"}) == [
        "tracking: register_as is no name of a model: it may not be empty, or hold / or :"
    ]
    (line,) = refusals(tracking={"register_as": "digits", "backends": ["wandb"]})
    assert "backends is ['wandb']: MLflow has the registry, so add mlflow to backends" in line
    (line,) = refusals(tracking={"register_as": "digits"}, data={"condition_channels": 3})
    assert "a registered model draws from seeds and classes alone" in line
