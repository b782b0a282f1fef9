"""In no step of the loop does the host wait for the device, send it numbers but the images, or keep memory."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import profiler
from torch.autograd.profiler_util import MEMORY_EVENT_NAME
from torch.utils._python_dispatch import TorchDispatchMode

from tests.launch import run_python
from tests.trainer.rank.step.tape import Tape
from tests.trainer.runs import Stopper
from trainer.config.io import load_config
from trainer.rank import build
from trainer.rank.loop import Loop
from trainer.rank.worker import run_rank

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
"""What needs a value, or a shape that depends on values, on the host."""
SENDS = (torch.ops.aten.lift_fresh.default,)
"""What makes a tensor of numbers in the host's memory, such as torch.tensor, which a GPU has to be sent."""
FIRST_STEPS = 4
"""In them kernels are built and the optimizer's state is made."""
RECORDED = 8
"""By this step of ten, both updates are recorded where each second step has penalties."""


class Transfers(TorchDispatchMode):
    """Counts them while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READS + SENDS:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> Transfers:
    """Counts what later steps of any loop read and send."""
    counter, one_step = Transfers(), Loop._one_step

    def counted(loop: Loop) -> None:
        with counter if loop.step >= FIRST_STEPS else nullcontext():
            one_step(loop)

    monkeypatch.setattr(Loop, "_one_step", counted)
    return counter


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam as it is on a GPU: it takes the guard's verdict as a tensor."""
    adam: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **kwargs: adam(*args, **(kwargs | {"fused": True})))


RISING = (
    "training.augmentation.probability={start: 0.0, end: 1.0, decay_images: 100}",
    "training.r2_gamma=0.1",
)
"""Augmentation with a course, and both penalties through it."""


def run(tiny: Sequence[str], directory: Path, engine: Sequence[str]) -> None:
    run_rank(load_config("digits", [*tiny, *engine, "scaling.world_size=1", f"run.directory={directory}"]), Stopper())


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [
        ("engine.backend=torch",),
        ("engine.backend=torch", *RISING),
        (
            "engine.backend=torch",
            "training.augmentation.adaptive.target=0.01",
            "training.augmentation.adaptive.images=256",
        ),
        ("engine.backend=deepspeed",),
        ("engine.zero_stage_g=1", "engine.zero_stage_d=1"),
        ("engine.zero_stage_g=2", "engine.zero_stage_d=2"),
    ],
)
def test_no_step_reads_or_sends_a_number_with_the_optimizer_of_a_gpu(tiny, tmp_path, transfers, fused, engine):
    run(tiny, tmp_path / "run", engine)
    assert transfers.counts == {"aten.lift_fresh.default": 2 * (10 - FIRST_STEPS)}  # the images and the labels


@pytest.mark.slow
def test_a_replayed_step_sends_the_images_and_labels_alone(tiny, tmp_path, transfers, fused, monkeypatch):
    tape = Tape()
    monkeypatch.setattr(build, "recorder_for", lambda device, world_size: tape)
    run(tiny, tmp_path / "run", ("engine.backend=torch", "engine.cuda_graphs=true"))
    assert tape.replayed == 6 + 1  # of G in steps 4 to 9, of D in step 9: each other step has penalties
    assert transfers.counts == {"aten.lift_fresh.default": 2 * (10 - FIRST_STEPS)}


def test_reads_and_tensors_of_numbers_are_counted(transfers):
    with transfers:
        torch.tensor([1.0, 2.0])
        torch.full((2,), 1.0)  # a kernel writes it
        torch.ones(()).item()
    assert transfers.counts == {"aten.lift_fresh.default": 1, "aten._local_scalar_dense.default": 1}


def allocations() -> profiler.profile:
    """Notes what is allocated and freed inside, also what only autograd holds."""
    return profiler.profile(profile_memory=True)


def kept(profile: profiler.profile | None) -> int:
    """Bytes that were allocated and not freed."""
    assert profile is not None
    # The events themselves: the profiler's own table of them takes it a second for each step.
    events: Any = profile.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    return sum(event.nbytes() for event in events if event.name() == MEMORY_EVENT_NAME)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that each later step of any loop allocates and does not free, of autograd's tensors as well."""
    found: list[int] = []
    one_step = Loop._one_step

    def counted(loop: Loop) -> None:
        if loop.step < FIRST_STEPS:
            one_step(loop)
            return
        with allocations() as profile:
            one_step(loop)
        found.append(kept(profile))

    monkeypatch.setattr(Loop, "_one_step", counted)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "deepspeed"])
def test_steps_free_what_they_allocate(tiny, tmp_path, left, backend):
    run(tiny, tmp_path / "run", [f"engine.backend={backend}"])
    assert len(left) == 10 - FIRST_STEPS
    assert sorted(left)[len(left) // 2] == 0, left
    assert max(left) < 1024, left  # the sums of a curve begin: scalars, no tensor of a batch


def test_what_is_kept_is_counted():
    held = []
    with allocations() as profile:
        held.append(torch.ones(100) * torch.ones(100))
    assert kept(profile) == 400


NO_WAIT = """
import sys

import torch

from tests.trainer.runs import Stopper
from trainer.config.io import load_config
from trainer.rank.loop import Loop
from trainer.rank.worker import run_rank

one_step = Loop._one_step


def checked(self):
    # The first steps build kernels and the optimizer's state.
    torch.cuda.set_sync_debug_mode("error" if self.step >= int(sys.argv[1]) else "default")
    try:
        one_step(self)
    finally:
        torch.cuda.set_sync_debug_mode("default")


Loop._one_step = checked
run_rank(load_config("digits", [*sys.argv[2:], "scaling.world_size=1"]), Stopper())
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "engine",
    [
        ("engine.backend=torch", "engine.compile=false"),
        ("engine.backend=torch", "engine.compile=false", *RISING),
        (
            "engine.backend=torch",
            "engine.compile=false",
            "training.augmentation.adaptive.target=0.01",
            "training.augmentation.adaptive.images=256",
        ),
        ("engine.backend=torch", "engine.compile=false", "engine.cuda_graphs=true"),
        ("engine.backend=deepspeed", "engine.compile=true"),
        ("engine.zero_stage_g=1", "engine.zero_stage_d=1", "engine.compile=false"),
        ("engine.zero_stage_g=2", "engine.zero_stage_d=2", "engine.compile=false"),
    ],
)
def test_the_host_waits_for_the_gpu_in_no_step(tiny, tmp_path, engine):
    settings = (*tiny, *engine, "training.precision=bf16", "data.loader_workers=1", "scaling.device=gpu")
    first = RECORDED if "engine.cuda_graphs=true" in engine else FIRST_STEPS
    done = run_python(["-c", NO_WAIT, str(first), *settings, f"run.directory={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stderr[-3000:]
