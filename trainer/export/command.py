"""Export a trained model for use without this project: `python -m trainer.export --run DIR --out DIR`.

Exit codes: 0, done; 2, the command, the run or the destination is wrong.
"""

import argparse
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from data.storage.arguments import whole_number
from data.storage.errors import UserError, as_command
from data.storage.paths import path_argument
from trainer.checkpoint.snapshot import save_snapshot
from trainer.checkpoint.storage import storage_of_run
from trainer.export.card import model_card
from trainer.export.programs import write_programs
from trainer.sample.draw import load_checkpoint


@as_command(failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=path_argument, required=True, help="directory of the run")
    parser.add_argument(
        "--checkpoint", type=whole_number(0), metavar="STEP", help="step of a checkpoint; default: the newest valid"
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder to make; it may exist and be empty")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    export(options.run, options.checkpoint, options.out)
    print(f"{options.out}: see README.md in it")
    return 0


def export(run: Path, step: int | None, out: Path) -> None:
    """Write the averaged generator of a checkpoint as programs, weights and card: all of the folder, or nothing.

    Args:
        run: directory of the run.
        step: step of the checkpoint; None: the newest valid one.
        out: the folder.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        UserError: something is in the folder, or the model cannot be exported.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out is {out}, which exists and is not an empty folder: give a new one, or empty it")
    (generator, diffusion, config), checkpoint = load_checkpoint(storage_of_run(run), step)
    draft = out.absolute().parent / f".{out.absolute().name}.draft-{os.getpid()}"
    draft.mkdir(parents=True)
    try:
        save_snapshot(draft, generator.state_dict(), config, checkpoint.step)
        write_programs(draft, generator, diffusion, config)
        card = model_card(Path(run).absolute().name, config, checkpoint.step, checkpoint.manifest)
        (draft / "README.md").write_text(card, encoding="utf-8")
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
