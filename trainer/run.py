"""Train: `python -m trainer.run --config digits`. To resume a run, give the same command again.

Exit codes: 0, finished; 75, stopped on request after a checkpoint, the same command resumes; 1, failed; 2, the command,
the config, the data or the cluster is wrong; 130, stopped at once.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from data.processes.leaving import leave
from data.processes.ray_environment import set_up_ray
from data.storage.errors import OperationError, StoppedError, UserError, as_command
from data.storage.redaction import redact, redact_values
from trainer.checkpoint.resume import add_resume_argument
from trainer.config.command_line import add_config_arguments, add_explain_arguments, add_price_argument, start_logging
from trainer.config.io import inside_ray_job, load_config, shown_config, with_absolute_paths
from trainer.config.sections import shown_address
from trainer.config.train_config import TrainConfig, num_steps
from trainer.driver.notifier import Event, Notifier
from trainer.driver.start import check_before_start
from trainer.plan.gpus import GPUS, gpu_named
from trainer.plan.plan import make_plan, render
from trainer.plan.prediction import predict, render_prediction
from trainer.plan.preset import Preset, add_preset_arguments, make_preset
from trainer.rank.progress import Outcome
from trainer.rank.run_folder import outcome_at
from trainer.timing.event_log import events_file
from trainer.timing.time_sheet import TimeSheet, process_began
from trainer.tracking.store import tracker_uris

STOPPED = os.EX_TEMPFAIL
"""Exit code of a run that was stopped on request before its end; it tells a scheduler to start the run again."""


@as_command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, plan, launch on Ray, close."""
    options = parse_arguments(arguments)
    start_logging(0)
    if preset := preset_of(options):
        print(f"{preset.words}\n", flush=True)
    config = config_of(options)
    if options.dry_run:
        plan = make_plan(config)
        print(shown_config(config))
        if address := shown_address(config.tracking.notify):
            print(f"notifies {address}\n")
        print(render(plan))
        if options.gpu:
            chosen = config.training.precision
            precision = "bf16" if chosen == "auto" else chosen  # all GPUs of the table have bf16
            prediction = predict(config, plan, gpu_named(options.gpu), precision)
            print(render_prediction(prediction, options.usd_per_gpu_hour))
        return 0
    config = with_absolute_paths(config, inside_job=inside_ray_job())
    done = check_before_start(config, options.resume)
    if done >= num_steps(config):
        print(_summary(config, outcome_at(config, done)))
        return 0
    return _launch(config)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's options; argparse exits if they are wrong.

    Raises:
        UserError: options do not go together, or there is no such GPU.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trainer.run",
        description="Train a Denoising Diffusion GAN on Ray Train and DeepSpeed. To resume, repeat the command.",
    )
    add_config_arguments(parser)
    add_resume_argument(parser)
    parser.add_argument(
        "--init-from", metavar="WHERE", help="start from the weights of a run, an exported model, or a file"
    )
    add_preset_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the plan, then exit")
    parser.add_argument(
        "--gpu", metavar="|".join(GPUS), help="with --dry-run: predict time and throughput on such GPUs, one per rank"
    )
    add_price_argument(parser, "with --gpu: predict the run's price too")
    add_explain_arguments(parser)
    options = parser.parse_args(arguments)
    if options.gpu and not options.dry_run:
        raise UserError("--gpu is for predictions, which --dry-run prints: add --dry-run, or leave --gpu out")
    if options.usd_per_gpu_hour is not None and not options.gpu:
        raise UserError(f"--usd-per-gpu-hour needs a GPU: add --gpu with one of {', '.join(GPUS)}, or leave it out")
    if options.gpu:
        gpu_named(options.gpu)
    return options


def config_of(options: argparse.Namespace) -> TrainConfig:
    """The config given by the options.

    Raises:
        ConfigError: the config is wrong.
    """
    preset = preset_of(options)
    return preset.config if preset else load_config(options.config, _overrides(options))


def preset_of(options: argparse.Namespace) -> Preset | None:
    """What `--gpus` chooses; None without it.

    Raises:
        ConfigError: the config is wrong, or does not fit.
    """
    return make_preset(options.config, _overrides(options), options)


def _overrides(options: argparse.Namespace) -> list[str]:
    return [*options.set, *([f"run.init_from={options.init_from}"] if options.init_from else [])]


def _launch(config: TrainConfig) -> int:
    set_up_ray()
    from trainer.driver.ray_train import RunDivergedError, RunFailedError, fit  # takes seconds

    notifier = Notifier(config.tracking.notify, config.run.directory)
    log_file = events_file(Path(config.run.directory), "driver")
    times = TimeSheet(log_file, since=process_began(), recorded=("ranks", "waiting"))

    def tell(event: Event, **facts: str | int) -> None:
        notifier.tell(event, **facts)
        times.tell(event, **redact_values(facts))

    tell("started")
    try:
        outcome = fit(config, lambda reason: tell("restarted", reason=reason), times.enter)
        tell("finished" if outcome.finished else "stopped", step=outcome.step, images=outcome.images)
    except RunFailedError as error:
        tell("diverged" if isinstance(error, RunDivergedError) else "failed", reason=_first_line(error))
        raise OperationError(f"{error}\nTo resume from the last checkpoint, give the same command again.") from error
    except SystemExit:  # Ray's reaction to SIGTERM before the ranks have started
        tell("stopped")
        raise StoppedError("stopped before the ranks started; the same command resumes", STOPPED) from None
    except KeyboardInterrupt:
        tell("stopped")
        raise StoppedError("stopped at once; the same command resumes from the last checkpoint") from None
    except Exception as error:  # a refusal, or a fault of this program
        tell("failed", reason=_first_line(error))
        raise
    finally:
        times.close()
        notifier.close()
    print(_summary(config, outcome))
    return 0 if outcome.finished else STOPPED


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _summary(config: TrainConfig, outcome: Outcome) -> str:
    directory = Path(config.run.directory)
    head = "finished" if outcome.finished else "stopped; the same command resumes"
    lines = [
        f"{head}: step {outcome.step}, {outcome.images} images",
        f"samples      {outcome.samples or 'none yet'}",
        f"checkpoint   {outcome.checkpoint}",
        f"snapshot     {outcome.snapshot or 'written at the end of the run'}",
    ]
    lines += [f"{name:12} {redact(uri)}" for name, uri in tracker_uris(config.tracking, directory).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    leave(main())
