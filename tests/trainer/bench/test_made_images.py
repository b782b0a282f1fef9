"""Generated data sets fit any config."""

from data.shards.index import load_index
from trainer.bench import made_images
from trainer.config.io import load_config


def test_pairs_of_many_channels_are_made(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(made_images, "NUM_IMAGES", 20)
    sets = ["data.image_channels=5", "data.condition_channels=2", "run.directory=unused"]
    index = load_index(made_images.make_images(load_config("digits", [*tiny, *sets]), tmp_path))
    assert (index.image_size, index.image_channels, index.condition_channels) == (8, 5, 2)
    assert (index.num_samples, index.num_classes) == (20, 10)
