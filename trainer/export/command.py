"""Export a trained model for use without this project: `python -m trainer.export --run DIR --out DIR`.

Exit codes: 0, done; 2, nothing was written: the command, the run or the destination is wrong, or an exported graph does
not compute what torch computes.
"""

import argparse
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from data.shards.index import load_index
from data.storage.arguments import whole_number
from data.storage.errors import OperationError, UserError, as_command
from data.storage.location import is_remote
from data.storage.paths import path_argument
from trainer.checkpoint.snapshot import is_snapshot, save_snapshot
from trainer.checkpoint.storage import storage_of_run
from trainer.config.train_config import TrainConfig
from trainer.evaluate.card import read_card
from trainer.export.card import Facts, model_card
from trainer.export.forms import FORMS
from trainer.sample.draw import Loaded, load_checkpoint, load_run
from trainer.tracking.provenance import collect_tags


@as_command(failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=path_argument, required=True, help="directory of the run, or of a snapshot")
    parser.add_argument(
        "--checkpoint", type=whole_number(0), metavar="STEP", help="step of a checkpoint; default: the newest valid"
    )
    parser.add_argument(
        "--to",
        type=_forms,
        default=("torch",),
        metavar="FORM[,FORM]",
        help=f"{', '.join(FORMS)}; several with commas (default torch). Weights as safetensors come with each",
    )
    parser.add_argument(
        "--figures",
        type=path_argument,
        action="append",
        default=[],
        metavar="FILE",
        help="a card of trainer.evaluate --card, whose figures the README.md of the model shows; may be repeated",
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder to make; it may exist and be empty")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    export(options.run, options.checkpoint, options.out, options.to, options.figures)
    print(f"{options.out}: see README.md in it")
    return 0


def _forms(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in FORMS:
            raise argparse.ArgumentTypeError(f"{name!r} is no form; allowed: {', '.join(FORMS)}")
    return names


def export(
    run: Path, step: int | None, out: Path, forms: Sequence[str] = ("torch",), figures: Sequence[Path] = ()
) -> None:
    """Write the averaged generator of a checkpoint in some forms, with weights and card: all of the folder, or nothing.

    Args:
        run: directory of the run, or a folder with a snapshot.
        step: step of the checkpoint; None: the newest valid one.
        out: the folder.
        forms: names of `FORMS`.
        figures: cards of `trainer.evaluate`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        UserError: something is in the folder, or the model cannot be exported.
        OperationError: a form does not compute what torch computes.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out is {out}, which exists and is not an empty folder: give a new one, or empty it")
    cards = [read_card(file) for file in figures]
    (generator, diffusion, config), facts = _load(run, step, cards)
    for form in forms:
        FORMS[form].check(config)
    draft = out.absolute().parent / f".{out.absolute().name}.draft-{os.getpid()}"
    draft.mkdir(parents=True)
    try:
        save_snapshot(draft, generator.state_dict(), config, facts.step or 0)
        for form in forms:
            FORMS[form].write(draft, generator, diffusion, config)
        card = model_card(Path(run).absolute().name, config, facts, forms)
        (draft / "README.md").write_text(card, encoding="utf-8")
        for file in draft.rglob("*.safetensors"):
            shutil.copymode(draft / "README.md", file)  # a run's files are its owner's; an export is there to be shared
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _load(run: Path, step: int | None, figures: list[dict]) -> tuple[Loaded, Facts]:
    if step is None and is_snapshot(run):
        loaded, manifest = load_run(run), {}
    else:
        loaded, checkpoint = load_checkpoint(storage_of_run(run), step)
        step, manifest = checkpoint.step, checkpoint.manifest
    commit = collect_tags("")["git_commit"]
    return loaded, Facts(
        step=step,
        manifest=manifest,
        source=_source(loaded[2], manifest.get("data")),
        commit=None if commit == "unknown" else commit,
        figures=figures,
    )


def _source(config: TrainConfig, digest: str | None) -> str | None:
    """What the training data was prepared from, if the prepared set is still where it was."""
    if is_remote(config.data.path):
        return None
    try:
        index = load_index(config.data.path)
    except (UserError, OperationError, OSError):
        return None
    return index.source if index.digest == digest else None
