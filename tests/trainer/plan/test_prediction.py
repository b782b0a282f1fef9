import dataclasses

import pytest
import torch

from data.storage.errors import UserError
from trainer.config.io import load_config
from trainer.plan.bytes_moved import Moved
from trainer.plan.gpus import GPUS, Gpu, gpu_named
from trainer.plan.plan import Plan, make_plan
from trainer.plan.prediction import Prediction, predict, render_prediction, step_seconds

GPU = Gpu(title="Made 1GB", bf16_tflops=4, tf32_tflops=2, fp32_tflops=1, gb_per_s=1000, memory_gb=1)


def moved(read: float = 0.0, *, operations: float = 0.0, bf16: float = 0.0, fp32: float = 0.0) -> Moved:
    group = Moved(read, 0.0, operations)
    group.flops |= {torch.bfloat16: bf16, torch.float32: fp32}
    return group


@pytest.mark.parametrize(
    ("traffic", "precision", "bound", "estimate"),
    [
        ({"cast": moved(1e12)}, "bf16", 1.0, 1 / 0.8),
        ({"convolution": moved(1e11, bf16=4e12)}, "bf16", 1.0, 1 / 0.6),
        ({"convolution": moved(fp32=2e12)}, "bf16", 1.0, 1 / 0.6),
        ({"convolution": moved(fp32=2e12)}, "tf32", 1.0, 1 / 0.6),
        ({"convolution": moved(fp32=2e12)}, "fp32", 2.0, 2 / 0.6),
        ({"convolution": moved(bf16=4e12, fp32=2e12)}, "bf16", 2.0, 2 / 0.6),
        ({"convolution": moved(bf16=4e12), "norm": moved(1e12)}, "bf16", 2.0, 1 / 0.6 + 1 / 0.8),
        ({"cast": moved(1e9, operations=1e6)}, "bf16", 1e-3, 6.0),
    ],
)
def test_each_kind_takes_the_longer_of_computing_and_moving(traffic, precision, bound, estimate):
    assert step_seconds(traffic, GPU, precision) == pytest.approx((bound, estimate))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(load_config("digits", ["scaling.world_size=2", "data.path=no/such/folder"]))


@pytest.mark.slow
def test_hours_price_rate_and_share_of_the_peak_follow_from_a_step(plan):
    prediction = Prediction(gpu=GPU, precision="fp32", plan=plan, step_s=((0.5, 2.0),), fused=True)
    assert prediction.images_per_s == pytest.approx(
        (2 * plan.batch.global_batch_size, plan.batch.global_batch_size / 2)
    )
    assert prediction.hours == (plan.num_steps * 0.5 / 3600, plan.num_steps * 2 / 3600)
    assert prediction.gpu_hours[1] == 2 * prediction.hours[1]
    assert prediction.mfu[0] == pytest.approx(plan.batch.global_batch_size * plan.costs.flops_per_image / 0.5 / 2e12)
    text = render_prediction(prediction, 3600.0)
    assert "USD, at 3,600.00 a GPU-hour" in text
    assert f"{2 * plan.num_steps * 2:,}" in text
    assert "2 x Made 1GB in fp32, with fused operators; nothing of it was measured" in text
    assert "USD" not in render_prediction(prediction)


@pytest.mark.slow
def test_a_run_of_two_stages_takes_the_time_of_both(plan):
    denoiser = "{denoiser: {images: 6400, training: {objective: gaussian, reconstruction: {weight: 0}}}}"
    config = load_config("digits", [f"stages={denoiser}", "data.path=no/such/folder"])
    both = make_plan(config)
    steps = [stage.num_steps for stage in both.stages]
    prediction = Prediction(gpu=GPU, precision="fp32", plan=both, step_s=((0.5, 1.0), (2.0, 4.0)), fused=True)
    assert prediction.hours == pytest.approx([(steps[0] * s + steps[1] * 4 * s) / 3600 for s in (0.5, 1.0)])
    assert prediction.images_per_s[0] == pytest.approx(both.num_images / 3600 / prediction.hours[0])
    assert "seconds of a step, stage denoiser" in render_prediction(prediction)
    (bound, _), (longer, _) = predict(config, both, GPUS["h200"], "bf16").step_s
    assert bound < longer


def test_a_plan_larger_than_the_memory_is_said_not_to_fit(plan):
    small = dataclasses.replace(GPU, memory_gb=(plan.state_bytes + plan.saved_bytes - 1) / 1e9)
    texts = [
        render_prediction(Prediction(gpu=gpu, precision="fp32", plan=plan, step_s=((1, 1),), fused=True))
        for gpu in (GPU, small)
    ]
    assert ["DOES NOT FIT" in text for text in texts] == [False, True]


@pytest.mark.slow
def test_estimate_is_never_below_the_bound_and_a_faster_memory_shortens_both(plan):
    config = load_config("digits", ["scaling.world_size=2"])
    found = {name: predict(config, plan, GPUS[name], "bf16").step_s[0] for name in ("h100", "h200")}
    assert all(bound < estimate for bound, estimate in found.values())
    assert found["h200"][0] < found["h100"][0]


def test_a_step_with_fused_operators_is_predicted_to_be_shorter_than_one_in_plain_torch(plan):
    fused, plain = (
        predict(load_config("digits", ["scaling.world_size=2", f"engine.fused={fused}"]), plan, GPUS["h100"], "bf16")
        for fused in ("true", "false")
    )
    assert all(ours < theirs for ours, theirs in zip(fused.step_s[0], plain.step_s[0], strict=True))
    assert "with fused operators" in render_prediction(fused)
    assert "with plain torch" in render_prediction(plain)


def test_gpus_are_found_in_any_case_and_others_refused_with_the_list():
    assert gpu_named("RTX4090") is GPUS["rtx4090"]
    with pytest.raises(UserError, match=r"--gpu is v100, .* only for h100, h200, a100, l40s, rtx4090: choose one"):
        gpu_named("v100")


@pytest.mark.parametrize("name", sorted(GPUS))
def test_data_sheets_are_dense_rates_in_order(name):
    gpu = GPUS[name]
    assert gpu.bf16_tflops == pytest.approx(2 * gpu.tf32_tflops, rel=0.02)  # so on every one of these GPUs
    assert gpu.flops_per_s("tf32") >= gpu.flops_per_s("fp32")
    assert f"{gpu.memory_gb:.0f}GB" in gpu.title
