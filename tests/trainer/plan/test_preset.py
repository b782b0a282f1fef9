"""`--gpus N --gpu-memory GB`: what is chosen for each config, and what is refused."""

import argparse

import pytest

from trainer.config.draft import ConfigError
from trainer.config.io import config_names, flat, load_config
from trainer.plan.preset import PLANNED_SHARE, Preset, make_preset

CHOSEN = {
    "training.micro_batch_size",
    "training.precision",
    "engine.checkpoint_activations",
    "scaling.world_size",
    "scaling.min_world_size",
    "scaling.device",
}


def preset(name: str, *overrides: str, gpus: int | None = 1, memory: int | None = 24) -> Preset:
    found = make_preset(name, overrides, argparse.Namespace(gpus=gpus, gpu_memory=memory))
    assert found
    return found


def refusal(name: str, *overrides: str, gpus: int | None = 1, memory: int | None = 24) -> str:
    with pytest.raises(ConfigError) as caught:
        make_preset(name, overrides, argparse.Namespace(gpus=gpus, gpu_memory=memory))
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", config_names())
def test_every_config_fits_one_gpu_of_24_gb_with_the_largest_micro_batch_and_trains_the_same(name):
    chosen, config = preset(name), load_config(name)
    differing = {key for key, value in flat(chosen.config).items() if flat(config)[key] != value}
    assert differing <= CHOSEN
    assert chosen.config.scaling.world_size == 1 and chosen.config.scaling.device == "gpu"
    micro, batch = chosen.config.training.micro_batch_size, config.training.global_batch_size
    assert micro
    assert f"training.micro_batch_size={micro}:" in chosen.words and f"the global batch stays {batch}" in chosen.words
    assert chosen.plan.batch.micro_batch_size == micro and chosen.plan.batch.global_batch_size == batch
    assert 0 < chosen.plan.state_bytes + chosen.plan.saved_bytes <= PLANNED_SHARE * 24e9


@pytest.mark.slow
def test_less_memory_takes_more_passes_and_then_computes_blocks_again():
    large = ("training.global_batch_size=2048",)
    assert preset("digits", *large, memory=4).config.training.micro_batch_size == 2048
    passes = preset("digits", *large, memory=2)
    micro = passes.config.training.micro_batch_size
    assert micro and micro < 2048 and not passes.config.engine.checkpoint_activations
    assert (
        f"training.micro_batch_size={micro}: {-(-2048 // micro)} passes for the 2048 images of a rank; " in passes.words
    )
    one_group = (*large, "discriminator.stddev_group_size=2048")
    assert preset("digits", *one_group, memory=2).config.engine.checkpoint_activations


def test_what_the_user_set_stays():
    chosen = preset("digits", "training.micro_batch_size=8", "training.precision=fp32", "scaling.world_size=1")
    assert (chosen.config.training.micro_batch_size, chosen.config.training.precision) == (8, "fp32")
    assert "training.micro_batch_size=8: 4 passes for the 32 images of a rank; yours, and it fits" in chosen.words
    assert "training.precision=fp32: yours" in chosen.words


def test_strided_groups_keep_the_micro_batch_of_the_config():
    """They compare the images of a forward pass: another number would train something else."""
    chosen = preset("digits", "discriminator.stddev_grouping=strided").config
    assert load_config("digits").scaling.world_size == 2
    assert (chosen.training.global_batch_size, chosen.training.micro_batch_size) == (32, 16)


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        ((), {"gpus": None}, "--gpu-memory is given without --gpus: add --gpus 1"),
        (("scaling.world_size=4",), {}, "--gpus is 1, but --set scaling.world_size=4 is given"),
        (("scaling.device=cpu",), {}, "--gpus is 1, but --set scaling.device=cpu is given"),
        (("training.micro_batch_size=6",), {}, "training.micro_batch_size (6) must be a multiple of"),
        (
            ("training.global_batch_size=2048", "training.micro_batch_size=2048"),
            {"memory": 1},
            "give GPUs of 2 GB or more, or leave --set training.micro_batch_size out",
        ),
        (
            (
                "training.global_batch_size=2048",
                "training.micro_batch_size=2048",
                "engine.checkpoint_activations=false",
            ),
            {"memory": 2},
            "give GPUs of 4 GB or more, or leave --set training.micro_batch_size out, which lets a smaller one be "
            "chosen, or leave --set engine.checkpoint_activations out",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(overrides, options, words):
    assert words in refusal("digits", *overrides, **options)


def test_memory_must_be_given_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "add --gpu-memory, such as 24" in refusal("digits", memory=None)
