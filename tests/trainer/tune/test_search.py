"""The search on made speeds: its order, what it keeps, and what ends it."""

from collections.abc import Callable
from pathlib import Path

from trainer.bench.trial import Outcome
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig
from trainer.tune.candidates import CANDIDATES, Candidate, Machine, Settings, proposals
from trainer.tune.command import override
from trainer.tune.search import Row, Search

Speed = Callable[[TrainConfig, float], Outcome]
GPU = Machine(cpus=8, gpus=1)


def measured(images_per_s: float, **more: float) -> Outcome:
    parts = {"time/data_s": 0.0, "time/d_s": 1.0}
    return Outcome({"images_per_s": images_per_s, "peak_memory_gib": 1.0} | parts | more, "", 1.0)


NO_MEMORY = Outcome(None, "out of memory", 1.0, out_of_memory=True)


class Tried:
    """Trials of `digits` on a made machine."""

    def __init__(self, speed: Speed, *given: str, machine: Machine = GPU, left: float = 1e9, trials: int = 99) -> None:
        self.asked: list[Settings] = []
        self.limits: list[float] = []
        self.given = ("scaling.world_size=1", *given)

        def load(settings: Settings) -> TrainConfig:
            return load_config("digits", [*self.given, *(override(*setting) for setting in settings.items())])

        def measure(config: TrainConfig, settings: Settings, limit_s: float) -> Outcome:
            self.asked.append(settings)
            self.limits.append(limit_s)
            return speed(config, limit_s)

        self.search = Search(
            load=load,
            measure=measure,
            machine=machine,
            time_left=lambda: left if len(self.asked) < trials else 0.5,
            longest_trial_s=100,
        )
        self.rows: list[Row] = list(self.search.rows())

    @property
    def best(self) -> Settings:
        assert self.search.best is not None
        return self.search.best.settings


def test_settings_that_are_faster_are_kept_and_added_to():
    def speed(config: TrainConfig, limit_s: float) -> Outcome:
        batch = config.training.micro_batch_size or 32
        return measured(10 * (1 + config.engine.compile) * (1 + (config.engine.backend == "torch")) + batch / 16)

    tried = Tried(speed, "scaling.device=gpu", "training.precision=fp32")
    assert tried.best == {"engine.compile": True, "engine.backend": "torch"}
    assert tried.asked[0] == {}
    assert tried.asked[1] == {"training.precision": "bf16"}, "the largest expected gain comes first"
    assert len({tuple(sorted(settings.items())) for settings in tried.asked}) == len(tried.asked), "nothing twice"
    assert [row.settings for row in tried.rows if row.is_best][-1] == tried.best


def test_a_gain_within_the_variation_of_the_speed_is_not_one():
    tried = Tried(lambda config, _: measured(100.0 + config.engine.compile), "scaling.device=gpu")
    assert tried.best == {}


def test_config_that_does_not_fit_is_tried_with_smaller_micro_batches():
    def speed(config: TrainConfig, limit_s: float) -> Outcome:
        batch = config.training.micro_batch_size or 32
        factor = 4 if config.training.precision == "bf16" else 1
        return measured(float(factor * batch)) if batch <= 8 * factor else NO_MEMORY

    tried = Tried(speed, "scaling.device=gpu", "training.precision=fp32")
    assert [settings.get("training.micro_batch_size") for settings in tried.asked[:3]] == [None, 16, 8]
    assert tried.best == {"training.precision": "bf16"}, "what saves memory lets the whole batch back in"
    assert [row.outcome.failure for row in tried.rows[:2]] == ["out of memory"] * 2


def test_failures_are_rows_and_only_a_config_that_cannot_be_measured_ends_the_search():
    crash = Outcome(None, "RuntimeError: no", 1.0)
    tried = Tried(lambda config, _: crash if config.engine.compile else measured(1.0), "scaling.device=gpu")
    assert "RuntimeError: no" in [row.outcome.failure for row in tried.rows]
    assert len(tried.rows) > 3
    nothing = Tried(lambda *_: crash, "scaling.device=gpu")
    assert (len(nothing.rows), nothing.search.best) == (1, None)


def test_no_trial_begins_after_the_end_and_none_may_take_longer_than_its_share():
    tried = Tried(lambda *_: measured(1.0), "scaling.device=gpu", trials=3)
    assert len(tried.rows) == 3
    assert set(tried.limits) == {100}
    assert set(Tried(lambda *_: measured(1.0), "scaling.device=gpu", left=7.0, trials=3).limits) == {7.0}


def test_cpu_chooses_ranks_and_threads_and_tries_nothing_that_only_a_gpu_has():
    tried = Tried(
        lambda config, _: measured(float(config.scaling.world_size)),
        "scaling.device=cpu",
        machine=Machine(cpus=4, gpus=0),
    )
    assert tried.best == {"scaling.world_size": 4}
    names = {name for settings in tried.asked for name in settings}
    assert names == {
        *("scaling.world_size", "scaling.cpus_per_worker", "training.micro_batch_size", "engine.backend"),
        "data.loader_workers",
    }
    used = [(row.config.scaling.world_size, row.config.scaling.cpus_per_worker) for row in tried.rows]
    assert max(ranks * threads for ranks, threads in used) == 4


def of(name: str) -> Candidate:
    return next(candidate for candidate in CANDIDATES if candidate.name == name)


def tried_of(name: str, machine: Machine, *given: str, waits: float = 0.0) -> list[Settings]:
    config = load_config("digits", ["scaling.device=gpu", *given])
    report = {"time/data_s": waits, "time/d_s": 1.0 - waits}
    return list(proposals(config, machine, report, of(name)))


def test_bfloat16_is_tried_on_a_cpu_that_multiplies_it_and_other_formats_on_gpus_only():
    bf16, tf32 = ({"training.precision": precision} for precision in ("bf16", "tf32"))
    assert tried_of("number format", GPU) == [bf16, tf32]
    on_cpu = ("scaling.device=cpu",)
    assert tried_of("number format", Machine(cpus=2, gpus=0, bf16_on_cpu=True), *on_cpu) == [bf16]
    assert tried_of("number format", Machine(cpus=2, gpus=0), *on_cpu) == []
    flags = Path("/proc/cpuinfo").read_text().split()
    assert Machine.here().bf16_on_cpu == ("avx512_bf16" in flags or "amx_bf16" in flags)


def test_loaders_of_a_gpu_are_tried_only_if_the_steps_wait_for_data():
    assert tried_of("loader processes", GPU, waits=0.01) == []
    tried = tried_of("loader processes", GPU, "scaling.world_size=1", waits=0.1)
    assert tried == [{"data.loader_workers": n} for n in (2, 4, 8)]


def test_zero_stages_are_tried_where_all_ranks_can_be_measured():
    assert tried_of("ZeRO stages", Machine(cpus=8, gpus=1), "scaling.world_size=2") == []
    assert len(tried_of("ZeRO stages", Machine(cpus=8, gpus=2), "scaling.world_size=2")) == 4


def test_cuda_graphs_are_tried_with_their_engine_where_one_rank_is_measured():
    graphs, without = tried_of("CUDA graphs", GPU, "scaling.world_size=1", "engine.zero_stage_g=1")
    assert load_config("digits", [*map(override, graphs, graphs.values()), "scaling.world_size=1"]).engine.cuda_graphs
    assert without == {"engine.cuda_graphs": False}
    assert tried_of("CUDA graphs", GPU, "scaling.world_size=2") == [], "one rank of two is measured"
    assert tried_of("CUDA graphs", GPU, "scaling.device=cpu") == []


def test_cuda_graphs_that_are_faster_are_kept_and_deepspeed_is_tried_without():
    tried = Tried(lambda config, _: measured(10.0 * (1 + config.engine.cuda_graphs)), "scaling.device=gpu")
    assert tried.best == {"engine.backend": "torch", "engine.cuda_graphs": True}
    assert {"engine.cuda_graphs": True} not in tried.asked
    assert tried.asked.count({"engine.backend": "torch"}) == 1


def test_micro_batch_is_left_alone_where_it_changes_the_groups_of_the_minibatch_deviation():
    assert tried_of("micro-batch", GPU, "discriminator.stddev_grouping=strided") == []
    sizes = [tried["training.micro_batch_size"] for tried in tried_of("micro-batch", GPU, "scaling.world_size=1")]
    assert sizes == [None, 16, 8, 4]
