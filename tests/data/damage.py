"""Damages samples of a prepared data set in its files."""

from data.shards.index import ShardIndex
from tests.data.conftest import open_shard


def damage(index: ShardIndex, *places: tuple[int, int]) -> list[str]:
    """Overwrite the images at (shard, sample); returns their keys."""
    keys = []
    for shard, number in places:
        reader = open_shard(index, index.shards[shard])
        sample = reader.read(number)
        reader.close()
        file = index.directory / sample.shard
        content = file.read_bytes()
        # The key makes the place unique: the header comes a block before the image.
        header = content.index(f"{sample.key}.png".encode())
        image = content.index(sample.content[:60], header)
        file.write_bytes(content[:image] + bytes(60) + content[image + 60 :])
        keys.append(sample.key)
    return keys


def key_of(index: ShardIndex, shard: int, sample: int) -> str:
    reader = open_shard(index, index.shards[shard])
    try:
        return reader.read(sample).key
    finally:
        reader.close()


def change_label(index: ShardIndex, shard: int, sample: int, content: bytes) -> str:
    """Overwrite the label of a sample in its file; returns the sample's key."""
    reader = open_shard(index, index.shards[shard])
    key = reader.read(sample).key
    reader.close()
    file = index.directory / index.shards[shard].name
    whole = bytearray(file.read_bytes())
    start = whole.index(f"{key}.cls".encode()) + 512
    whole[start : start + 1] = content
    file.write_bytes(whole)
    return key
