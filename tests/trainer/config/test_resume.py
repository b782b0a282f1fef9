import pytest

from trainer.config.draft import ConfigError
from trainer.config.io import flat, load_config
from trainer.config.resume import RULES, check_resumable, diff_configs, rule_for

BASE = (
    "data.loader_workers=1",
    "training.total_images=128_000",
    "training.global_batch_size=64",
    "training.r1_gamma=0.02",
    "checkpoint.save_interval_steps=200",
)
"""Values that the tests below change, whatever `digits` says."""


def changed(*overrides: str):
    return load_config("digits", (*BASE, *overrides))


OLD = changed()


def test_every_field_has_a_rule_and_every_rule_a_field():
    keys = flat(changed("stages={first: {images: 3200}}"))
    assert {key for key in keys if rule_for(key)} == set(keys)
    assert [name for name in RULES if not any(key == name or key.startswith(f"{name}.") for key in keys)] == []


def test_same_config_is_resumable_without_a_note():
    assert diff_configs(OLD, changed()) == ()
    assert check_resumable(OLD, changed()) == ()


def test_difference_names_field_and_both_values():
    new = changed("checkpoint.save_interval_steps=null", "generator.channel_multipliers=[1, 1]")
    assert [str(difference) for difference in diff_configs(OLD, new)] == [
        "generator.channel_multipliers: [1, 2] -> [1, 1]",
        "checkpoint.save_interval_steps: 200 -> null",
    ]


def test_longer_run_is_allowed_with_a_note_on_the_cosine():
    assert check_resumable(OLD, changed("training.total_images=256_000")) == (
        "training.total_images: 128000 -> 256000 (the cosine of the learning rate is stretched, the rate jumps at the "
        "point of resuming)",
    )


@pytest.mark.parametrize(
    "override",
    [
        "run.directory=elsewhere",
        "run.deterministic=true",
        "data.path=elsewhere",
        "data.loader_workers=0",
        "training.micro_batch_size=16",
        "scaling.world_size=4",
        "scaling.device=gpu",
        "engine.backend=torch",
        "engine.zero_stage_g=3",
        "checkpoint.keep_last=9",
        "tracking.backends=[]",
    ],
)
def test_what_leaves_the_computation_alone_may_change(override):
    assert len(check_resumable(OLD, changed(override))) == 1


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "data.horizontal_flip=true",
        "data.shuffle_window_shards=2",
        "training.global_batch_size=32",
        "training.precision=bf16",
        "training.r1_gamma=0.5",
        "training.r1_interval_steps=null",
        "training.ema_decay=0.9",
        "training.learning_rate_g.peak=0.1",
        "training.adam.eps=1e-4",
        "diffusion.num_timesteps=3",
        "generator.dropout=0.1",
        "discriminator.base_channels=16",
    ],
)
def test_what_changes_the_computation_may_not_change(override):
    key = override.split("=")[0]
    with pytest.raises(ConfigError) as caught:
        check_resumable(OLD, changed(override))
    first, last = caught.value.lines
    assert first.startswith(f"{key}: ")
    assert first.endswith(f" may not change when a run is resumed: {rule_for(key).reason}")
    assert last.startswith("May change: run.directory, run.group, run.deterministic, run.init_from, ")
    assert last.endswith("For anything else start a new run in another run.directory")


def test_every_forbidden_change_is_named_and_allowed_ones_are_not():
    with pytest.raises(ConfigError) as caught:
        check_resumable(OLD, changed("run.seed=5", "training.r1_gamma=1", "scaling.world_size=1"))
    assert caught.value.lines[:-1] == (
        "run.seed: 0 -> 5 may not change when a run is resumed: the seed keys the order of the data and every random "
        "draw",
        "training.r1_gamma: 0.02 -> 1.0 may not change when a run is resumed: it is part of the loss",
    )


def test_strided_deviation_groups_bind_the_micro_batch():
    strided = "discriminator.stddev_grouping=strided"
    old = changed(strided)
    with pytest.raises(ConfigError) as caught:
        check_resumable(old, changed(strided, "scaling.world_size=1"))
    assert caught.value.lines[0] == (
        "training.micro_batch_size: 32 -> 64 images in one forward pass of a rank may not change here: the "
        "discriminator's minibatch deviation (strided groups of 4) would compare other images. Set "
        "training.micro_batch_size to 32"
    )
    assert check_resumable(old, changed(strided, "scaling.world_size=1", "training.micro_batch_size=32"))


def test_contiguous_deviation_groups_bind_nothing():
    assert len(check_resumable(OLD, changed("scaling.world_size=3", "training.micro_batch_size=4"))) == 2


@pytest.mark.parametrize(
    ("stored", "asked", "device", "refused"),
    [
        ("bf16", "auto", "cpu", "bf16 -> fp32"),
        ("fp32", "auto", "cpu", None),
        ("bf16", "auto", "gpu", None),  # only the ranks know their GPUs
        ("fp32", "auto", "gpu", None),
        ("tf32", "bf16", "gpu", "tf32 -> bf16"),
        ("fp32", "tf32", "cpu", "fp32 -> tf32"),
    ],
)
def test_precision_is_compared_as_far_as_auto_is_known(stored, asked, device, refused):
    old, new = (changed(f"training.precision={p}", f"scaling.device={device}") for p in (stored, asked))
    if refused is None:
        assert check_resumable(old, new) == ()
        return
    with pytest.raises(ConfigError, match=f"training.precision: {refused} may not change"):
        check_resumable(old, new)
