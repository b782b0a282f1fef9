"""One rank of two whose run of pairs is evaluated, where rank 1 cannot read the pairs: what each rank says.

Not a test itself: `test_during_training.py` runs it. Its arguments are a network's file, a reference without pairs,
the data set as rank 0 sees it, as rank 1 sees it, and the overrides of the config.
"""

import json
import sys

from data.storage.errors import UserError
from models.diffusion import Diffusion
from trainer.checkpoint.snapshot import build_generator
from trainer.config.io import load_config
from trainer.engine.ranks import Ranks
from trainer.evaluate.during_training import RunEvaluation


def main() -> None:
    network, reference, *places = sys.argv[1:5]
    ranks = Ranks.join("cpu", 300)
    more = [f"evaluation.network={network}", f"evaluation.reference={reference}", f"data.path={places[ranks.rank]}"]
    config = load_config("digits", [*sys.argv[5:], *more, "evaluation.num_samples=160"])
    evaluation, said = RunEvaluation(config, ranks), ""
    try:
        evaluation.figures(build_generator(config).eval(), Diffusion.from_config(config.diffusion))
    except UserError as error:
        said = f"{type(error).__name__}: {error}"
    of_ranks = ranks.gather(said)
    if ranks.rank == 0:
        sys.stdout.write(json.dumps(of_ranks))
    ranks.leave()


if __name__ == "__main__":
    main()
