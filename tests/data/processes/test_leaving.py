from tests.launch import run_python

ENDS = """
import atexit, sys
from data.processes.leaving import leave

class Crashes:
    def __del__(self):
        print("torn down")

kept = Crashes()
sys.modules["kept"] = kept
atexit.register(print, "registered")
print("said", end=" ")
leave(7)
"""


def test_a_process_runs_what_was_registered_prints_all_and_is_not_torn_down():
    done = run_python(["-c", ENDS])
    assert (done.returncode, done.stdout, done.stderr) == (7, "said registered\n", "")
