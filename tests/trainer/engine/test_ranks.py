"""The group of ranks, and what is left of it afterwards."""

import pytest

from tests.launch import run_python

# In a process of its own: engines of other tests keep groups of this one for as long as they are there.
PROGRAM = """
import time
from pathlib import Path

import torch

from trainer.engine.interface import EngineConfig
from trainer.engine.zero import make_engine
from trainer.engine.ranks import Agreement, Ranks


def gloo_threads() -> int:
    return sum((task / "comm").read_text().startswith("pt_gloo") for task in Path("/proc/self/task").iterdir())


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def train() -> None:
    network = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    engine = make_engine(network, optimizer, EngineConfig(), zero_stage=1, grad_accum_steps=1)
    engine.backward(engine.module(torch.ones(1, 2)).sum())
    engine.step()
    engine.close()


ranks = Ranks.join("cpu", 60)
agreement = Agreement(ranks)
agreement.propose(False)
assert not agreement.reached()
assert ranks.gather("here") == ["here"]
assert gloo_threads() > 0
torch.set_num_threads(2)
long = torch.arange(1 << 18).float()  # every thread that copies this by itself gets help from one more of OpenMP
(long + 1).add_(1)  # now the main thread has its own
before = threads()
(gathered,) = ranks.gather(long)
assert torch.equal(gathered, long)
print("begun by a gather:", threads() - before)
torch.set_num_threads(1)
ranks.leave()
# The kernel lists a thread that has been joined a moment longer.
deadline = time.monotonic() + 10
while gloo_threads() and time.monotonic() < deadline:
    time.sleep(0.001)
print("left:", gloo_threads())
for _ in range(2):
    ranks = Ranks.join("cpu", 60)
    train()
    ranks.leave()
print("trained twice")
"""


@pytest.fixture(scope="module")
def said() -> list[str]:
    done = run_python(["-c", PROGRAM], timeout_s=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_no_thread_of_the_group_outlives_it_and_engines_of_later_groups_work(said):
    """One that does aborts the process now and then, when it lets go of tensors while the interpreter ends."""
    assert said[-2:] == ["left: 0", "trained twice"]


@pytest.mark.slow
def test_a_long_message_starts_no_thread(said):
    """With more of OpenMP's threads than cores, every later operation of the rank waits for threads to wake up."""
    assert "begun by a gather: 0" in said
