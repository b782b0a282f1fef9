"""The group of ranks, and what is left of it afterwards."""

import subprocess
import sys

# In a process of its own: engines of other tests keep groups of this one for as long as it runs.
PROGRAM = """
from pathlib import Path

from trainer.ranks import Agreement, Ranks


def gloo_threads() -> int:
    return sum((task / "comm").read_text().startswith("pt_gloo") for task in Path("/proc/self/task").iterdir())


ranks = Ranks.join("cpu", 60)
agreement = Agreement(ranks)
agreement.propose(False)
assert not agreement.reached()
assert ranks.gather("here") == ["here"]
assert gloo_threads() > 0
ranks.leave()
print("left:", gloo_threads())
"""


def test_no_thread_of_the_group_outlives_it():
    """One that does aborts the process now and then, when it lets go of tensors while the interpreter ends."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "left: 0" in done.stdout.splitlines()
