import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig, split_batch
from trainer.plan import plan as plan_module
from trainer.plan.cost import Costs, count_costs
from trainer.plan.plan import Plan, make_plan, render, state_memory


@pytest.fixture(scope="module", autouse=True)
def costs_are_counted_once() -> Iterator[None]:
    """For the same networks, micro-batch and objective; what else a config says changes no cost."""
    counted: dict[str, Costs] = {}

    def once(config: TrainConfig) -> Costs:
        training = dataclasses.replace(config.training, total_images=0)
        networks = (config.generator, config.discriminator, config.diffusion)
        key = repr((networks, config.image_form, training, split_batch(config)))
        if key not in counted:
            counted[key] = count_costs(config)
        return counted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "count_costs", once)
        yield


@pytest.fixture(scope="module")
def digits() -> Plan:
    return make_plan(load_config("digits", ["data.path=no/such/folder"]))


@pytest.fixture(scope="module")
def cifar10() -> Plan:
    return make_plan(load_config("cifar10", ["data.path=no/such/folder", "engine.zero_stage_g=2"]))


@pytest.mark.slow
def test_steps_are_rounded_up_to_whole_batches(cifar10):
    assert cifar10.num_steps == 351_563  # 90,000,000 / 256 = 351,562.5
    assert cifar10.num_images == 351_563 * 256


@pytest.mark.slow
def test_missing_data_leaves_the_epochs_unknown_and_says_why(digits):
    assert digits.epochs is None
    assert "no/such/folder" in digits.data_note
    text = render(digits)
    assert "epochs unknown, see data" in text
    assert "reads   no/such/folder (not readable yet: " in text


@pytest.mark.slow
def test_epochs_come_from_the_index(monkeypatch):
    @dataclasses.dataclass
    class Index:
        num_samples: int = 6400

    monkeypatch.setattr(plan_module, "load_index", lambda path: Index())
    plan = make_plan(load_config("digits", ["training.total_images=64_000", "training.global_batch_size=64"]))
    assert plan.epochs == 10
    assert "1,000 steps, 64,000 images; 10 epochs of 6,400" in render(plan)


def test_stage_0_holds_everything_on_every_rank():
    memory = state_memory(1000, 0, 4, num_averages=1)
    assert dataclasses.astuple(memory) == (0, 4000, 4000, 8000, 0, 4000)
    assert memory.total == 20_000


def test_stage_1_partitions_moments_and_adds_a_master_copy():
    assert dataclasses.astuple(state_memory(1000, 1, 4, num_averages=1)) == (1, 4000, 4000, 2000, 1000, 4000)


def test_stage_2_partitions_gradients_too():
    assert dataclasses.astuple(state_memory(1000, 2, 4, num_averages=1)) == (2, 4000, 1000, 2000, 1000, 4000)


def test_stage_3_partitions_parameters_and_average_too():
    assert dataclasses.astuple(state_memory(1000, 3, 4, num_averages=1)) == (3, 1000, 1000, 2000, 1000, 1000)


def test_discriminator_has_no_average_and_no_stage_3(cifar10):
    assert [memory.stage for memory in cifar10.memory_d] == [0, 1, 2]
    assert {memory.average for memory in cifar10.memory_d} == {0}


def test_partitions_are_rounded_up():
    assert state_memory(10, 3, 4, num_averages=0).parameters == 12


def test_checkpoint_holds_parameters_and_moments_of_both_and_the_average(cifar10):
    g, d = cifar10.costs.parameters_g, cifar10.costs.parameters_d
    assert cifar10.checkpoint_bytes == 4 * (g + 2 * g + d + 2 * d + g)


def test_text_shows_sizes_batch_arithmetic_and_the_chosen_stage(cifar10):
    lines = render(cifar10).splitlines()
    assert "  generator         48.43 M parameters    14.08 GFLOP forward, one image" in lines
    assert "  discriminator     12.74 M parameters     2.95 GFLOP forward, one pair" in lines
    assert "  256 images a step = micro 64 x accum 1 x world 4; 64 on each rank" in lines
    assert "  351,563 steps, 90,000,128 images; epochs unknown, see data" in lines
    assert [line.split()[:2] for line in lines if "*" in line][1:] == [["generator", "2*"], ["discriminator", "0*"]]
    assert lines[-1] == "  writes  runs/cifar10/ with checkpoints, samples, snapshots, tracking"


@pytest.mark.slow
def test_uneven_shares_are_spelled_out():
    plan = make_plan(load_config("digits", ["scaling.world_size=3", "training.micro_batch_size=8"]))
    assert "  32 images a step = 2 x 12 + 1 x 8 over the ranks, in whole groups of 4; micro 8 or less" in render(plan)
    plan = make_plan(load_config("digits", ["scaling.world_size=1", "training.micro_batch_size=20"]))
    assert "  32 images a step = 1 x 32 over the ranks, in whole groups of 4; micro 20 or less" in render(plan)


def test_columns_of_the_memory_table_line_up(cifar10):
    lines = render(cifar10).splitlines()
    head = next(i for i, line in enumerate(lines) if line.lstrip().startswith("network "))
    assert {len(line) for line in lines[head : head + 8]} == {len(lines[head])}


def test_levels_and_the_share_of_x0_pred_in_each_step_are_shown(cifar10):
    text = render(cifar10)
    assert "noise level sigma of x_t       0.96, 3.4, 17, 152" in text
    assert "weight of x0_pred in x_tm1     1, 0.67, 0.27, 0.058" in text


@pytest.mark.slow
def test_r1_at_every_step_is_said_so():
    plan = make_plan(load_config("digits", ["training.r1_interval_steps=null"]))
    assert plan.costs.penalty_interval_steps == 1
    assert "at every step" in render(plan)


def test_each_stage_has_its_steps_levels_and_arithmetic():
    denoiser = "{denoiser: {images: 6400, training: {objective: gaussian}, diffusion: {num_timesteps: 3}}}"
    plan = make_plan(load_config("digits", [f"stages={denoiser}", "data.path=no/such/folder"]))
    first, last = plan.stages
    batch = plan.batch.global_batch_size
    assert (first.num_steps, last.num_steps) == (6400 // batch, plan.num_steps - 6400 // batch)
    assert (first.costs.parameters_d, plan.costs) == (0, last.costs)
    assert plan.flops == pytest.approx(first.flops + last.flops)
    assert plan.saved_bytes == last.costs.saved_bytes > first.costs.saved_bytes
    assert plan.memory_d[0].parameters == 4 * last.costs.parameters_d > 0
    text = render(plan)
    assert f"stage denoiser: {first.num_steps:,} steps, 6,400 images, " in text
    assert f"stage last: {last.num_steps:,} steps, " in text
    assert text.count("noise level sigma") == 2


PLAIN_GAME = ("training.objective=non_saturating", "training.r2_gamma=0")


def test_r1_of_weight_zero_is_not_counted():
    plan = make_plan(load_config("digits", [*PLAIN_GAME, "training.r1_gamma=0"]))
    assert plan.costs.flops_per_image == plan.costs.update_g.flops_per_image + plan.costs.update_d.flops_per_image
    assert "without penalties" in render(plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "capability", "text"),
    [
        (["training.precision=tf32"], None, "precision tf32"),
        (["scaling.device=cpu"], (9, 0), "precision auto: fp32 on the CPU"),
        (
            ["scaling.device=gpu"],
            None,
            "precision auto: bf16 on a GPU that has it, otherwise fp32; this machine has no GPU",
        ),
        (["scaling.device=gpu"], (9, 0), "precision auto: bf16 on the GPU of this machine, Made GPU"),
        (["scaling.device=gpu"], (7, 0), "precision auto: fp32 on the GPU of this machine, Made GPU"),
    ],
)
def test_text_says_what_the_precision_is(monkeypatch, settings, capability, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Made GPU")
    config = load_config("digits", settings)
    assert f"  {text}" in render(make_plan(config)).splitlines()


@pytest.mark.parametrize(("device", "world_size", "told"), [("gpu", 1, True), ("gpu", 2, False), ("cpu", 1, False)])
def test_text_says_that_cuda_graphs_hold_memory_where_there_are_some(device, world_size, told):
    where = (f"scaling.device={device}", f"scaling.world_size={world_size}")
    plan = make_plan(load_config("digits", ["engine.backend=torch", "engine.cuda_graphs=true", *where]))
    assert ("what the CUDA graphs of both updates hold at the same time" in render(plan)) == told


def test_planning_writes_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    render(make_plan(load_config("digits")))
    assert list(tmp_path.iterdir()) == []
