"""Values beyond all reason: refused by name, with the reason, at once."""

import pytest

from trainer.config.draft import ConfigError
from trainer.config.io import load_config


def lines_for(override: str) -> tuple[str, ...]:
    """What is said against an override."""
    with pytest.raises(ConfigError) as caught:
        load_config("digits", [override])
    return caught.value.lines


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generator.base_channels=1000000000000", "> 0 and <= 16384 (wider networks fit no device), got 1000000000000"),
        ("discriminator.base_channels=9007199254740993", "and <= 1024 (published networks have 64)"),
        ("generator.num_res_blocks=100000", "and <= 32 (published networks have up to 8)"),
        ("diffusion.num_timesteps=2000000000", "and <= 100000 (published processes have up to 4,000 steps)"),
        ("diffusion.beta_max=1e9", "and <= 1000 (above, float64 keeps nothing of the image)"),
        ("scaling.world_size=1000000000", "and <= 16384 (each rank keeps a connection to all others)"),
        ("scaling.timeout_s=9999999999999999999", "and <= 10000000 (that is 115 days)"),
        ("scaling.watchdog_s=1e300", "and <= 10000000.0 (that is 115 days), or null"),
        ("data.cache_gb=1e300", "and <= 1000000000.0 (no disk is larger than 10^18 bytes)"),
        ("tracking.flush_timeout_s=1e300", "and <= 86400 (that is a day)"),
        ('run.directory="a\\0b"', "the document holds the control character U+0000; leave it out"),
        ('run.group="a\\x1bb"', "the document holds the control character U+001B; leave it out"),
        ("run.directory=''", "run.directory is empty: give a path"),
        (f"run.directory=/tmp/{'y' * 256}", "run.directory has a part of 256 bytes, more than the 255 of a file name"),
        (f"run.init_from={'ü' * 128}", "run.init_from has a part of 256 bytes, more than the 255 of a file name"),
        (f"data.path={'y/' * 2000}", "data.path has 4000 bytes: at most 3800, since longer names follow below it"),
        ("data.path=file://[bad", "data.path is file://[bad, which is not a URL"),
        ("checkpoint.directory=s3://[bad", "checkpoint.directory is s3://[bad, which is not a URL"),
    ],
)
def test_absurd_value_is_refused_by_its_name_with_the_reason(override, message):
    (line,) = lines_for(override)
    assert line.startswith(f"--set {override}: ")
    assert message in line


def test_long_names_that_files_can_have_pass():
    config = load_config("digits", [f"run.directory=/tmp/{'y' * 255}", f"data.path={'y/' * 1900}"])
    assert len(config.run.directory) == 260


def test_every_number_of_ranks_down_to_one_is_checked_at_once():
    wide = ["scaling.min_world_size=1", "scaling.world_size=16384", "training.global_batch_size=65536"]
    assert load_config("digits", wide).scaling.world_size == 16384
