"""What one rank does: build, resume, train, close."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from torch import Tensor, nn

from data.shards.index import load_index
from data.storage.location import redact
from data.stream.batches import BadSampleLimit, Batch, BatchIterator
from data.stream.pipeline import open_batches
from models.diffusion import Diffusion
from models.networks import build_discriminator
from trainer.algorithm.ema import Ema
from trainer.algorithm.losses import OBJECTIVES
from trainer.algorithm.randomness import fold_seed
from trainer.algorithm.step import Players
from trainer.checkpoint.snapshot import build_generator, load_initial_weights, save_snapshot
from trainer.config.io import dump_config, flat
from trainer.config.sections import FIGURES
from trainer.config.train_config import TrainConfig
from trainer.engine.compiled import compiled_forward
from trainer.engine.interface import Engine
from trainer.engine.plain import IdleEngine, make_adam
from trainer.engine.ranks import Ranks
from trainer.engine.zero import make_engine
from trainer.evaluate.during_training import RunEvaluation
from trainer.rank.divergence import Diverged, SkippedUpdates
from trainer.rank.loop import Loop, Share
from trainer.rank.progress import Driver
from trainer.rank.replaced import ReplacedSamples
from trainer.rank.run_checkpoints import RunCheckpoints
from trainer.rank.run_folder import Outcome, make_run_directory, outcome_at
from trainer.rank.state import TrainingState
from trainer.rank.watchdog import Watchdog
from trainer.sample.draw import sample_images
from trainer.sample.images import save_grid
from trainer.tracking.provenance import collect_tags
from trainer.tracking.spool import Status
from trainer.tracking.tracker import NullTracker, Tracker, open_tracker

log = logging.getLogger(__name__)


class Worker:
    """One rank's networks, average, data and tracker, from the first build to the last close."""

    def __init__(self, config: TrainConfig, ranks: Ranks, driver: Driver, watchdog: Watchdog | None = None) -> None:
        self.config, self.ranks, self.driver = config, ranks, driver
        self.watchdog = watchdog or Watchdog(None)
        self.directory = Path(config.run.directory)
        self.tracker: Tracker = NullTracker()
        self.share = Share.of(config, ranks.rank, ranks.world_size)
        self.index = load_index(config.data.path)
        limit = BadSampleLimit(max_percent=config.data.max_bad_percent, num_samples=self.index.num_samples)
        self.replaced = ReplacedSamples(self.directory, ranks, limit)
        self.checkpoints = RunCheckpoints(config, ranks)
        try:
            self.checkpoint = self.checkpoints.newest()
            known = self.checkpoint.manifest.get("metrics", {}) if self.checkpoint else {}
            self.curves: dict[str, float] = {name: value for name, value in known.items() if name not in FIGURES}
            self.figures: tuple[int, dict[str, float]] = (0, {})
            self.evaluation = RunEvaluation(config, ranks)
            self._build()
        except BaseException:
            self.checkpoints.release()
            raise

    def _build(self) -> None:
        config, device = self.config, self.ranks.device
        # One seed for all: each rank builds the same weights, and nothing has to be sent.
        torch.manual_seed(fold_seed(config.run.seed, 1))
        generator = build_generator(config)
        training, form = config.training, config.data
        discriminator = (
            build_discriminator(
                config.discriminator,
                image_size=form.image_size,
                image_channels=form.image_channels,
                num_classes=form.num_classes,
            )
            if training.objective in OBJECTIVES
            else None
        )
        if config.run.init_from and not self.checkpoint:
            load_initial_weights(generator, Path(config.run.init_from))
        if self.ranks.rank == 0 or config.evaluation.interval_images:
            self.sampler = build_generator(config, device).eval().requires_grad_(False)
        engine_g = self._engine(generator, config.engine.zero_stage_g)
        engine_d = self._engine(discriminator, config.engine.zero_stage_d) if discriminator else IdleEngine()
        self.players = Players(
            generator=engine_g,
            discriminator=engine_d,
            diffusion=Diffusion.from_config(config.diffusion, device),
            r1_gamma=training.r1_gamma,
            r2_gamma=training.r2_gamma,
            objective=OBJECTIVES.get(training.objective, OBJECTIVES["non_saturating"]),
            world_size=self.ranks.world_size,
            bf16=training.precision == "bf16",
            compiled_g=compiled_forward(
                engine_g.module,
                config.engine,
                deterministic=config.run.deterministic,
                zero_stage=config.engine.zero_stage_g,
            ),
            compiled_d=compiled_forward(
                engine_d.module,
                config.engine,
                deterministic=config.run.deterministic,
                zero_stage=config.engine.zero_stage_d,
            )
            if discriminator
            else None,
        )
        self.ema = Ema(self.players.generator, training.ema_decay)
        self.skipped = SkippedUpdates(config.guard, device, self.ranks.world_size)
        self.state = TrainingState(config, self.ranks, self.index, self.players, self.ema, self.skipped)

    def _engine(self, network: nn.Module, zero_stage: int) -> Engine:
        config, device = self.config, self.ranks.device
        return make_engine(
            network,
            make_adam(network.to(device), config.training.adam, device),
            config.engine,
            zero_stage=zero_stage,
            grad_accum_steps=self.share.grad_accum_steps,
            max_gradient_norm=config.guard.max_gradient_norm,
        )

    def run(self) -> Outcome:
        """Train from the newest valid checkpoint, or from the start, to the end or to a stop."""
        loop = Loop(
            config=self.config,
            ranks=self.ranks,
            share=self.share,
            players=self.players,
            ema=self.ema,
            batches=iter(()),
            driver=self.driver,
            on_log=self._log,
            on_sample=self._draw_grid,
            on_save=lambda step: self._save(loop),
            on_evaluate=self._evaluate,
            skipped=self.skipped,
            watchdog=self.watchdog,
        )
        status: Status = "FAILED"
        with ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            if self.checkpoint:
                self.state.restore(self.checkpoint, loop.statistics)
                self.checkpoints.forget_downloads()
                loop.resume_at(self.checkpoint.step)
            self.checkpoints.start(self.state, self.checkpoint.step if self.checkpoint else None)
            if self.ranks.rank == 0:
                self._open_tracker()
                stack.callback(lambda: self.tracker.close(status))
            finished = self._train(loop)
            self.watchdog.enter("end")
            if finished:  # before the checkpoint, which says that all is done
                self._save_snapshot(loop.step)
            self.checkpoints.save_last(lambda: self._save(loop), loop.step)
            status = "FINISHED" if finished else "KILLED"
        return outcome_at(self.config, loop.step)

    def _train(self, loop: Loop) -> bool:
        """Run the loop, going back to the last checkpoint when too many updates are skipped; whether it finished."""
        while True:
            with closing(self.open_batches(loop.step)) as batches:
                loop.batches = self._noted(batches, loop)
                try:
                    return loop.run()
                except Diverged as found:
                    diverged = found
            self._roll_back(loop, diverged)

    def _roll_back(self, loop: Loop, diverged: Diverged) -> None:
        """Take up the last checkpoint again, in this process; a collective."""
        self.watchdog.enter("start")
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            raise diverged.error("there is no checkpoint to go back to, and the same start would come to the same step")
        if diverged.final:
            raise diverged.error(
                f"it may go back guard.max_rollbacks ({self.config.guard.max_rollbacks}) times for the same steps. Its "
                f"last checkpoint is {checkpoint.path}"
            )
        if self.ranks.rank == 0:
            log.warning("%s. Going back to step %d, %s", diverged, checkpoint.step, checkpoint.path)
        self.state.restore(checkpoint, loop.statistics)
        self.checkpoints.forget_downloads()
        loop.resume_at(checkpoint.step)

    def open_batches(self, first_batch: int) -> BatchIterator:
        """This rank's micro-batches from batch `first_batch` on."""
        return open_batches(
            self.config.data,
            self.index,
            seed=self.config.run.seed,
            global_batch_size=self.share.global_batch_size,
            share=(self.share.start, self.share.stop),
            micro_batch_size=self.share.micro_batch_size,
            first_batch=first_batch,
            pin_memory=self.ranks.device.type == "cuda",
        )

    def _noted(self, batches: Iterable[Batch], loop: Loop) -> Iterator[Batch]:
        for batch in batches:
            loop.statistics.count_replaced(len(batch.replaced))
            self.replaced.note(batch.replaced)
            yield batch

    def _evaluate(self, step: int) -> None:
        self._fill_sampler(self.ema.full_state())
        self.figures = step, self.evaluation.measure(self.sampler, self.players.diffusion)
        self.tracker.log_metrics(step, self.figures[1])

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self.curves = metrics
        saves = {f"checkpoint/{name}": seconds for name, seconds in self.checkpoints.take_times().items()}
        failures = {"checkpoint_failures": float(self.checkpoints.take_failures())}
        self.tracker.log_metrics(step, metrics | failures | saves)
        if metrics["replaced_samples"]:  # the sum over the ranks: all of them see it
            self.replaced.publish(self.tracker)

    def close(self) -> None:
        """End a save that is under way, and release lease and engines."""
        self.checkpoints.close()
        self.players.generator.close()
        self.players.discriminator.close()

    def _save(self, loop: Loop) -> None:
        """Have the state after the step that has just been done written, beside those that follow."""
        self.replaced.publish(self.tracker)  # a run that goes on from here does not meet them again
        # The figures of an evaluation belong to the weights of its step alone.
        self.checkpoints.note(self.curves | (self.figures[1] if self.figures[0] == loop.step else {}))
        self.checkpoints.save(self.state, loop.statistics, loop.step, self.tracker.run_id)

    def _save_snapshot(self, step: int) -> None:
        state = self.ema.full_state()
        folder = self.directory / "snapshots" / f"step-{step:08d}"
        if self.ranks.rank == 0:
            self._fill_sampler(state)
            save_snapshot(folder, self.sampler.state_dict(), self.config, step)
            for file in sorted(folder.iterdir()):
                self.tracker.log_artifact(file, "snapshot")

    def _fill_sampler(self, state: dict[str, Tensor]) -> None:
        """The averaged parameters, and the generator's fixed buffers, into the network that draws."""
        self.sampler.load_state_dict(self.state.buffers() | state)

    def _grid_file(self, step: int) -> Path:
        return self.directory / "samples" / f"step-{step:08d}.png"

    def _draw_grid(self, step: int) -> None:
        state = self.ema.full_state()  # a collective at ZeRO stage 3
        if self.ranks.rank != 0:
            return
        self._fill_sampler(state)
        images = sample_images(
            self.sampler, self.players.diffusion, self.config, num=self.config.grids.num_images, seed=0
        )
        file = self._grid_file(step)
        save_grid(file, images)
        self.tracker.log_image(step, "samples", file)

    def _open_tracker(self) -> None:
        checkpoint = self.checkpoint
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "config.yaml").write_text(text := redact(dump_config(self.config)))
        if self.config.tracking.backend == "mlflow":
            self.tracker = open_tracker(
                self.config.tracking,
                self.directory,
                params=flat(self.config),
                config_yaml=text,
                tags=collect_tags(self.index.digest),
                run_name=self.directory.name,
                last_step=checkpoint.step if checkpoint else None,
                run_id=checkpoint.manifest["mlflow_run_id"] if checkpoint else None,
            )


def prepare_torch(config: TrainConfig) -> None:
    """Threads, number formats and determinism of this process, before anything is computed."""
    if config.scaling.device == "cpu":
        torch.set_num_threads(config.scaling.cpus_per_worker)
    # TF32 keeps 10 bits of mantissa: neither float32 nor the R1 penalty would be what they are called.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def run_rank(config: TrainConfig, driver: Driver) -> Outcome:
    """Join the group, train, leave it: the whole life of one rank."""
    prepare_torch(config)
    scaling, rank = config.scaling, int(os.environ.get("RANK", 0))
    directory = make_run_directory(config.run)
    with Watchdog(scaling.watchdog_s, allowance_s=scaling.timeout_s, rank=rank, directory=directory) as watchdog:
        ranks = Ranks.join(scaling.device, scaling.timeout_s)
        try:
            worker = Worker(config, ranks, driver, watchdog)
            try:
                return worker.run()
            finally:
                worker.close()
        finally:
            ranks.leave()
