"""The stages of a config as they are measured."""

import pytest

from trainer.bench.steps.measured import measured_parts
from trainer.config.train_config import num_steps


def test_each_stage_is_made_short_and_keeps_its_share_of_the_run(tmp_path):
    overrides = ["training.micro_batch_size=64", "training.learning_rate_d.warmup_images=1000"]
    first, last = measured_parts("cifar10-fast", overrides, tmp_path, 3, 4)
    assert (first.name, last.name) == ("denoiser", "last")
    assert first.share == pytest.approx(25 / 45, rel=1e-4)
    assert first.share + last.share == 1
    assert (first.config.training.objective, last.config.training.objective) == ("gaussian", "relativistic")
    for part in (first, last):
        training = part.config.training
        assert (num_steps(part.config), part.config.tracking.log_interval_steps, part.config.stages) == (12, 3, {})
        assert (training.global_batch_size, training.micro_batch_size) == (256, 64)
        for rate in (training.learning_rate_g, training.learning_rate_d):
            assert rate.delay_images == rate.warmup_images == 0
        assert (part.config.run.directory, part.config.tracking.backends) == (str(tmp_path), ())


def test_run_without_stages_is_one_part_that_starts_from_nothing(tmp_path):
    overrides = ["run.init_from=/nowhere", "checkpoint.keep_best=fid", "tracking.register_as=mine"]
    overrides += ["scaling.min_world_size=1"]
    (part,) = measured_parts("digits", overrides, tmp_path, None, 1)
    assert (part.name, part.share) == ("", 1)
    assert part.config.run.init_from is part.config.checkpoint.keep_best is part.config.scaling.min_world_size is None
    assert part.config.tracking.register_as is None
    assert num_steps(part.config) == part.config.training.r1_interval_steps
