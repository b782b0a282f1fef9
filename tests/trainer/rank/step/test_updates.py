"""Training with recorded updates is, bit for bit, training without: weights, moments, average, statistics, curves."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from data.stream.batches import Batch
from tests.launch import run_python
from tests.trainer.rank.step.tape import Tape
from tests.trainer.runs import Recorder, Stopper, assert_same_state, configure, state_of, train
from trainer.algorithm.pairs import RawBatch
from trainer.rank import build
from trainer.rank.step import updates
from trainer.rank.step.graphs import WARM_UP, Repeated
from trainer.rank.step.inputs import Inputs

STEPS = 18
"""Courses end after ten. It is no multiple of four, after which the sums for an adaptive probability are none."""
EACH_STEP = (f"training.total_images={16 * STEPS}", "tracking.log_interval_steps=1")
VARIES = ("time/", "step_time", "system/", "images_per_s", "peak_memory_gib")
"""What the names of curves begin with that no two runs have in common."""

GAMES = {
    "micro-batches, classes, augmentation": (
        "training.micro_batch_size=8",
        "training.objective=relativistic",
        "data.num_classes=10",
        "training.label_dropout=0.3",
        "training.r2_gamma=0.1",
        "training.augmentation.transforms=[shift, cutout]",
        "training.augmentation.probability=0.5",
        "generator.dropout=0.1",
    ),
    "beta2 on a course": (
        "training.adam.beta2={start: 0.5, end: 0.9, decay_images: 160}",
        "training.r1_gamma={start: 1.0, end: 0.5, decay_images: 500}",
        "training.r1_interval_steps=4",
    ),
    "weight on a course": (
        "training.reconstruction.weight={start: 8.0, end: 0.0, decay_images: 160}",
        "training.learning_rate_g.warmup_images=32",
    ),
    "probability on a course": (
        "training.augmentation.probability={start: 0.0, end: 0.5, decay_images: 160}",
        "training.r1_interval_steps=4",
    ),
    "states that follow the game": (
        "training.micro_batch_size=8",
        "training.gradient_normalization=true",
        "training.afd=1.0",
        "training.denoising=0.5",
        "discriminator.sees=marginal",
        "discriminator.predicts=[x_t, x0]",
        "discriminator.kind=resnext",
        "training.augmentation.adaptive.target=0.01",
        "training.augmentation.adaptive.images=256",
    ),
    "penalties by finite differences": (
        "training.penalty=finite_difference",
        "training.r1_interval_steps=3",
        "training.precision=bf16",
    ),
    "gaussian": ("training.objective=gaussian", "training.noise.kind=log_normal", "generator.time_embedding=log_sigma"),
}
QUICK = "micro-batches, classes, augmentation"
EACH_GAME = [pytest.param(name, marks=[pytest.mark.slow] * (name != QUICK)) for name in GAMES]


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    """Takes the place of CUDA graphs in all runs with engine.cuda_graphs."""
    tape = Tape()
    monkeypatch.setattr(build, "recorder_for", lambda device, world_size: tape)
    return tape


def curves(recorder: Recorder) -> dict[int, dict[str, float]]:
    """All curves but those of time and of the machine."""
    return {
        step: {name: value for name, value in values.items() if not name.startswith(VARIES)}
        for step, values in recorder.metrics.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("game", EACH_GAME)
def test_a_recorded_run_equals_one_that_is_not_bit_for_bit(tiny, tmp_path, tape, game):
    _, plain = train(configure(tiny, tmp_path / "plain", *EACH_STEP, *GAMES[game]))
    assert tape.recorded == 0
    _, recorded = train(configure(tiny, tmp_path / "recorded", *EACH_STEP, *GAMES[game], "engine.cuda_graphs=true"))
    assert tape.recorded == (1 if game == "gaussian" else 2)
    assert tape.replayed > WARM_UP
    assert_same_state(state_of(tmp_path / "recorded", STEPS), state_of(tmp_path / "plain", STEPS))
    assert curves(recorded) == curves(plain)
    assert len({values["learning_rate_g"] for values in curves(plain).values()}) > STEPS // 2


@pytest.mark.slow
def test_a_recorded_run_that_stops_and_continues_ends_as_an_undisturbed_one(tiny, tmp_path, tape):
    sets = (*EACH_STEP, *GAMES[QUICK])
    train(configure(tiny, tmp_path / "plain", *sets))
    sets += ("engine.cuda_graphs=true",)
    train(configure(tiny, tmp_path / "recorded", *sets), Stopper(at=9))
    replayed = tape.replayed
    assert replayed
    assert train(configure(tiny, tmp_path / "recorded", *sets))[0].finished
    assert tape.replayed > replayed
    assert_same_state(state_of(tmp_path / "recorded", STEPS), state_of(tmp_path / "plain", STEPS))


def spoil(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[Path, int], bool]) -> None:
    """In bad steps of a run's directory, a table that both updates use is not a number, as when a device fails."""
    load = Inputs.load
    sound: dict[Inputs, torch.Tensor] = {}

    def spoiled(self: Inputs, batches: Sequence[Batch], step: int) -> Sequence[RawBatch]:
        table = self._players.diffusion.posterior_coef_x0
        values = sound.setdefault(self, table.clone())
        table.copy_(values * float("nan") if is_bad(Path(self._config.run.directory), step) else values)
        return load(self, batches, step)

    monkeypatch.setattr(Inputs, "load", spoiled)


BAD_STEPS = (1, 6, 9, 12)
"""Of those, 6 and 12 replay the update of G alone, and 9 also that of D."""


@pytest.mark.slow
def test_updates_are_skipped_in_a_recording_as_without(tiny, tmp_path, tape, monkeypatch):
    spoil(monkeypatch, lambda directory, step: step in BAD_STEPS)
    _, plain = train(configure(tiny, tmp_path / "plain", *EACH_STEP))
    _, recorded = train(configure(tiny, tmp_path / "recorded", *EACH_STEP, "engine.cuda_graphs=true"))
    for part in ("d", "g"):
        skipped = [step - 1 for step, values in recorded.metrics.items() if values[f"skipped_updates_{part}"]]
        assert skipped == list(BAD_STEPS)
    assert curves(recorded) == curves(plain)
    assert_same_state(state_of(tmp_path / "recorded", STEPS), state_of(tmp_path / "plain", STEPS))


@pytest.mark.slow
def test_recordings_serve_on_after_a_rollback(tiny, tmp_path, tape, monkeypatch):
    met: list[tuple[Path, int]] = []

    def failed_once(directory: Path, step: int) -> bool:
        met.append((directory, step))
        return step in (10, 11) and met.count((directory, step)) == 1

    spoil(monkeypatch, failed_once)
    sets = (*EACH_STEP, "guard.max_skipped_in_row=2", "checkpoint.save_interval_steps=8")
    for name, more in (("plain", ()), ("recorded", ("engine.cuda_graphs=true",))):
        assert train(configure(tiny, tmp_path / name, *sets, *more))[0].finished
        assert met.count((tmp_path / name, 8)) == 2, "it went back to step 8"
    assert tape.recorded == 2
    assert_same_state(state_of(tmp_path / "recorded", STEPS), state_of(tmp_path / "plain", STEPS))


@pytest.mark.slow
def test_each_stage_records_its_own_updates(tiny, tmp_path, tape):
    total = f"training.total_images={16 * (10 + STEPS)}"
    sets = (*EACH_STEP, total, "stages={first: {images: 160, training: {objective: gaussian}}}")
    for name, more in (("plain", ()), ("recorded", ("engine.cuda_graphs=true",))):
        assert train(configure(tiny, tmp_path / name, *sets, *more))[0].finished
    assert tape.recorded == 3
    assert_same_state(state_of(tmp_path / "recorded", 10 + STEPS), state_of(tmp_path / "plain", 10 + STEPS))


class Careless(Repeated):
    """Replays whatever the host's numbers are."""

    def __call__(self, work, numbers):
        return super().__call__(work, "the same")


@pytest.mark.slow
def test_a_recording_that_is_replayed_with_other_numbers_is_found(tiny, tmp_path, tape, monkeypatch):
    monkeypatch.setattr(updates, "Repeated", Careless)
    sets = (*EACH_STEP, *GAMES["weight on a course"])
    train(configure(tiny, tmp_path / "plain", *sets))
    train(configure(tiny, tmp_path / "recorded", *sets, "engine.cuda_graphs=true"))
    with pytest.raises(AssertionError):
        assert_same_state(state_of(tmp_path / "recorded", STEPS), state_of(tmp_path / "plain", STEPS))


SCRIPT = """
import sys

from tests.trainer.runs import Stopper
from trainer.config.io import load_config
from trainer.rank.worker import run_rank
from trainer.rank.step import graphs

graphs.WARM_UP = int(sys.argv[1])
record, recorded = graphs.CudaGraphs.record, []
graphs.CudaGraphs.record = lambda self, work: (recorded.append(work), record(self, work))[1]
run_rank(load_config("digits", sys.argv[2:]), Stopper())
print(len(recorded))
"""
"""Trains with CUDA graphs after so many steps of warm-up."""


def trained_on_gpu(directory: Path, warm_up: int, sets: Sequence[str]) -> int:
    """Train, and the number of graphs that were captured."""
    done = run_python(["-c", SCRIPT, str(warm_up), *sets, f"run.directory={directory}"])
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("game", EACH_GAME)
def test_a_run_with_cuda_graphs_equals_one_that_ends_before_they_are_recorded_bit_for_bit(tiny, tmp_path, game):
    alone = ("engine.backend=torch", "scaling.world_size=1", "scaling.device=gpu", "run.deterministic=true")
    sets = (*tiny, *alone, *EACH_STEP, *GAMES[game], "engine.cuda_graphs=true")
    assert trained_on_gpu(tmp_path / "plain", STEPS, sets) == 0
    assert trained_on_gpu(tmp_path / "recorded", WARM_UP, sets) == (1 if game == "gaussian" else 2)
    assert_same_state(state_of(tmp_path / "recorded", STEPS), state_of(tmp_path / "plain", STEPS))
