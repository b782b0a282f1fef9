"""One rank of two that start from a run whose checkpoints are in a bucket: how often each downloads.

Not a test itself: `test_build.py` runs it. Its arguments are the overrides of the config.
"""

import json
import sys
from typing import Any

from data.storage.writable import WritableStorage
from trainer.checkpoint.format import CheckpointError
from trainer.config.io import load_config
from trainer.engine.ranks import Ranks
from trainer.rank.build import load_start, new_networks


def main() -> None:
    downloaded: list[str] = []
    download = WritableStorage.download

    def counted(storage: WritableStorage, name: str, *more: Any, **named: Any) -> None:
        downloaded.append(name)
        download(storage, name, *more, **named)

    WritableStorage.download = counted  # type: ignore[method-assign]
    config, ranks = load_config("digits", sys.argv[1:]), Ranks.join("cpu", 120)
    networks, error = new_networks(config), ""
    try:
        load_start(networks, config, ranks)
    except CheckpointError as raised:
        error = str(raised)
    sums = [sum(p.double().sum().item() for p in network.parameters()) for network in networks.values()]
    of_ranks = ranks.gather([len(downloaded), sums, error])
    if ranks.rank == 0:
        sys.stdout.write(json.dumps(of_ranks))
    ranks.leave()


if __name__ == "__main__":
    main()
