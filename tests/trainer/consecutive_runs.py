"""One group of ranks that trains one run after another, so that processes and libraries start only once.

Not a test itself. Each argument is a run, the overrides of its config as a JSON list:

    torchrun --standalone --nproc-per-node 2 -m tests.trainer.consecutive_runs '["run.seed=1"]' '["run.seed=2"]'
"""

import json
import sys

from tests.trainer.runs import Stopper
from trainer.config.command_line import check_data
from trainer.config.io import load_config
from trainer.engine.ranks import Ranks
from trainer.rank.worker import Worker


def main() -> None:
    ranks = Ranks.join("cpu", 120)
    for words in sys.argv[1:]:
        config = load_config("digits", [*json.loads(words), f"scaling.world_size={ranks.world_size}"])
        check_data(config)
        worker = Worker(config, ranks, Stopper())
        worker.run()
        worker.close()
    ranks.leave()


if __name__ == "__main__":
    main()
