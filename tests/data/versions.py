"""The same shards as a data set of another version of the format."""

import json
from pathlib import Path

from data.shards.index import ShardIndex, load_index


def write_version_1(index: ShardIndex, target: Path) -> ShardIndex:
    """Copy a data set without its offsets, with the index.json that version 1 wrote."""
    target.mkdir()
    for shard in index.shards:
        (target / shard.name).write_bytes((index.directory / shard.name).read_bytes())
    document = json.loads((index.directory / "index.json").read_text(encoding="utf-8"))
    for shard in document["shards"]:
        del shard["offsets"]
    content = json.dumps({**document, "version": 1}, indent=1, ensure_ascii=False) + "\n"
    (target / "index.json").write_text(content, encoding="utf-8")
    return load_index(target)
