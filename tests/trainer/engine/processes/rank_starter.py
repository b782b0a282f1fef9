"""Starts groups of ranks for `tests.launch.run_ranks`: requests and answers are lines of JSON.

A process of its own, because a process has one fork server: that of the tests belongs to the workers of `data`.
"""

import json
import os
import sys
from pathlib import Path

from tests.launch import run_as_main
from trainer.driver.forked_ranks import TookTooLongError, load_before_forking, run_group


def main() -> None:
    load_before_forking("tests.trainer.engine.processes.loaded_ranks")
    for line in sys.stdin:
        asked = json.loads(line)
        os.environ.clear()
        os.environ.update(asked["environment"])
        out, errors = Path(asked["out"]), Path(asked["errors"])
        try:
            code = run_group(
                asked["ranks"], run_as_main, asked["arguments"], log=out, errors=errors, timeout_s=asked["timeout_s"]
            )
            answer = {"code": code}
        except TookTooLongError as error:
            answer = {"too long": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
