"""A walk passes through the samples of its seeds, stays on the sphere of the noise, and is written as an animation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.storage.errors import UserError
from tests.trainer.runs import configure, train
from trainer.config.io import load_config
from trainer.sample.draw import Loaded, load_run, sample_run
from trainer.sample.images import save_animation
from trainer.sample.walk import SampleNoise, noise_of, walk
from trainer.walk import main


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """Of a model with classes."""
    directory = tmp_path_factory.mktemp("run")
    # A rate that moves the near-zero output layer away from grey within ten steps.
    train(configure(tiny, directory, "training.learning_rate_g.peak=0.05", "data.num_classes=10"))
    return directory


def frames_of(loaded: Loaded, *args: int, **kwargs: object) -> torch.Tensor:
    seeds = list(args)
    return torch.cat(list(walk(*loaded, seeds=seeds, **kwargs))).int()  # pyright: ignore[reportArgumentType]


def is_image(frame: torch.Tensor, run: Path, seed: int, label: int) -> bool:
    """Whether it is that sample; the place in a batch may change the order of float sums, which may turn a rounding."""
    return bool((frame - sample_run(run, 1, seed=seed, classes=[label])[0].int()).abs().max() <= 1)


def test_a_closed_walk_meets_the_sample_of_each_seed_and_its_class_and_never_the_first_one_twice(run):
    frames = frames_of(load_run(run), 4, 9, 2, num_frames=12, classes=[3, 5])
    assert frames.shape == (12, 1, 8, 8)
    for place, seed, label in ((0, 4, 3), (4, 9, 5), (8, 2, 3)):
        assert is_image(frames[place], run, seed, label)
    assert len({tuple(frame.flatten().tolist()) for frame in frames}) == 12


def test_an_open_walk_ends_at_its_last_seed(run):
    frames = frames_of(load_run(run), 4, 9, num_frames=70, classes=[3, 5], closed=False)  # more than one batch
    assert len(frames) == 70
    assert is_image(frames[0], run, 4, 3) and is_image(frames[-1], run, 9, 5)
    steps = (frames[1:] - frames[:-1]).abs().float().mean(dim=(1, 2, 3))
    assert steps.max() < (frames[0] - frames[-1]).abs().float().mean()


def test_between_two_classes_their_vectors_are_mixed_and_afterwards_the_network_is_as_before(run):
    loaded = load_run(run)
    # The same seed twice: its noise at the middle of the way is its own, times sqrt 2.
    same = frames_of(loaded, 4, 4, num_frames=4, classes=[3])
    mixed = frames_of(loaded, 4, 4, num_frames=4, classes=[3, 5])
    assert torch.equal(same[0], mixed[0])
    assert not torch.equal(same[1], mixed[1])
    assert torch.equal(frames_of(loaded, 4, 4, num_frames=4, classes=[3]), same)


def test_noise_between_two_seeds_keeps_its_variance(tiny):
    config = load_config("digits", [*tiny, "run.directory=unused", "generator.latent_dim=1000"])
    noise = noise_of([1, 2], config)
    assert isinstance(noise, SampleNoise)
    mixed = (noise.z[0] + noise.z[1]) / 2**0.5
    assert mixed.std().item() == pytest.approx(1, abs=0.05)  # 4,000 numbers
    assert abs((noise.z[0] * noise.z[1]).mean().item()) < 0.06


@pytest.mark.parametrize(("suffix", "form"), [("webp", "WEBP"), ("png", "PNG"), ("gif", "GIF")])
def test_the_command_writes_an_animation_that_repeats_for_ever(run, tmp_path, suffix, form, capsys):
    file = tmp_path / f"walk.{suffix}"
    words = ["--run", str(run), "--seeds", "0-2", "--classes", "1", "--frames", "6", "--fps", "10", "--out", str(file)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"6 frames: {file}\n"
    with Image.open(file) as animation:
        assert (animation.format, animation.n_frames, animation.size) == (form, 6, (256, 256))  # pyright: ignore[reportAttributeAccessIssue]
        animation.seek(2)
        if form != "GIF":
            corner = animation.convert("L").resize((8, 8), Image.Resampling.NEAREST)
            assert is_image(torch.from_numpy(np.array(corner))[None].int(), run, 1, 1)
        assert animation.info["loop"] == 0
        assert animation.info["duration"] == 100


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "walk.avi"], "allowed are names that end in .webp, .png, .gif"),
        (["--seeds", "3"], "a walk needs at least two seeds, but 1 is given"),
        (["--seeds", "0-9", "--frames", "5"], "5 frames are wanted, but 10 seeds need one each at least"),
        (["--classes", "10"], "classes are 10; allowed: 0 to 9"),
        (["--seeds", "0-1", "--classes", "1,2,3"], "3 classes are given for 2 seeds"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(run, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    assert main(["--run", str(run), "--out", "walk.webp", *more]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_points_in_the_plane_make_no_animation(tmp_path):
    with pytest.raises(UserError, match="draws points in the plane"):
        save_animation(tmp_path / "a.webp", torch.zeros(3, 2, 1, 1, dtype=torch.uint8), 10)


def test_a_video_has_the_frames_in_their_order_and_needs_its_library(tmp_path, monkeypatch):
    import av

    levels = torch.arange(0, 250, 25, dtype=torch.uint8)
    frames = levels[:, None, None, None].expand(-1, 1, 9, 9)  # an odd side
    save_animation(tmp_path / "a.mp4", frames, 20)
    with av.open(str(tmp_path / "a.mp4")) as video:
        assert video.streams.video[0].average_rate == 20
        shown = torch.tensor([float(frame.to_ndarray(format="gray").mean()) for frame in video.decode(video=0)])
    torch.testing.assert_close(shown, levels.float(), atol=3.0, rtol=0)  # what the codec loses
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    monkeypatch.setattr("trainer.sample.video.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"av, which this Python does not have: pip install '\.\[video\]'"):
        save_animation(tmp_path / "b.mp4", frames, 20)
