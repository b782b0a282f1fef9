"""Export a trained model for use without this project: `python -m trainer.export --run DIR --out DIR`.

Exit codes: 0, done; 2, it was not done, as the message says: the command, the run or the destination is wrong, an
exported graph does not compute what torch computes, or the folder could not be sent.
"""

import argparse
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from data.shards.index import load_index
from data.storage.errors import OperationError, UserError, as_command
from data.storage.files import check_writable, replaced
from data.storage.location import is_remote
from data.storage.paths import path_argument
from trainer.checkpoint.retention import Choice
from trainer.checkpoint.snapshot import DISCRIMINATOR, is_snapshot, load_weights, save_snapshot, step_of_snapshot
from trainer.checkpoint.storage import find_checkpoint, storage_of_run
from trainer.checkpoint.whole import trained_discriminator
from trainer.config.train_config import TrainConfig
from trainer.evaluate.card import read_card, weights_sha256
from trainer.export.card import Facts, model_card
from trainer.export.forms import FORMS
from trainer.export.hub import check_hub, push
from trainer.sample.draw import Loaded, add_run_arguments, load_checkpoint, load_run
from trainer.tracking.provenance import collect_tags


@as_command(failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m trainer.export", description=(__doc__ or "").splitlines()[0])
    add_run_arguments(parser)
    parser.add_argument(
        "--to",
        type=_forms,
        default=("torch",),
        metavar="FORM[,FORM]",
        help=f"{', '.join(FORMS)}; several with commas (default torch). Weights as safetensors come with each",
    )
    parser.add_argument(
        "--discriminator",
        action="store_true",
        help="write the discriminator's weights too, for those who train the model further with run.init_from",
    )
    parser.add_argument(
        "--figures",
        type=path_argument,
        action="append",
        default=[],
        metavar="FILE",
        help="a card of trainer.evaluate --card, whose figures of these very weights the README.md of the model shows; "
        "may be repeated",
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder to make; it may exist and be empty")
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="send the folder to this repository of the Hugging Face Hub, too; a new one is private",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.push is not None:
        check_hub(options.push)
    export(options.run, options.checkpoint, options.out, options.to, options.figures, options.discriminator)
    print(f"{options.out}: see README.md in it")
    if options.push is not None:
        print(f"sent to {push(options.out, options.push)}")
    return 0


def _forms(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in FORMS:
            raise argparse.ArgumentTypeError(f"{name!r} is no form; allowed: {', '.join(FORMS)}")
    return names


def export(
    run: Path,
    choice: Choice | None,
    out: Path,
    forms: Sequence[str] = ("torch",),
    figures: Sequence[Path] = (),
    discriminator: bool = False,
) -> None:
    """Write the averaged generator of a checkpoint in some forms, with weights and card: all of the folder, or nothing.

    Args:
        run: directory of the run, or a folder with a snapshot.
        choice: which checkpoint; None: the newest valid one, or the snapshot.
        out: the folder.
        forms: names of `FORMS`.
        figures: cards of `trainer.evaluate`.
        discriminator: write its weights, too.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        UserError: something is in the folder, the model cannot be exported, or it has no discriminator.
        OperationError: a form does not compute what torch computes.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out is {out}, which exists and is not an empty folder: give a new one, or empty it")
    check_writable(out)
    cards = [read_card(file) for file in figures]
    (generator, diffusion, config), facts = _load(run, choice, cards)
    judge = _discriminator(run, facts.step) if discriminator else None
    for form in forms:
        FORMS[form].check(config)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with replaced(out.absolute()) as draft:
        draft.mkdir()
        save_snapshot(draft, generator.state_dict(), config, facts.step or 0, judge)
        for form in forms:
            FORMS[form].write(draft, generator, diffusion, config)
        card = model_card(Path(run).absolute().name, config, facts, forms)
        (draft / "README.md").write_text(card, encoding="utf-8")
        for file in draft.rglob("*.safetensors"):
            shutil.copymode(draft / "README.md", file)  # a run's files are its owner's; an export is there to be shared


def _load(run: Path, choice: Choice | None, figures: list[dict]) -> tuple[Loaded, Facts]:
    if is_snapshot(run):
        loaded, step, manifest = load_run(run, choice), step_of_snapshot(run), {}
    else:
        loaded, checkpoint = load_checkpoint(storage_of_run(run), "latest" if choice is None else choice)
        step, manifest = checkpoint.step, checkpoint.manifest
    measured = _of_weights(figures, weights_sha256(loaded[0].state_dict()))
    commit = collect_tags("")["git_commit"]
    return loaded, Facts(
        step=step,
        manifest=manifest,
        source=_source(loaded[2], manifest.get("data")),
        commit=None if commit == "unknown" else commit,
        figures=measured,
    )


def _of_weights(cards: Sequence[dict], sha256: str) -> list[dict]:
    """The cards, each with the results of these weights alone."""
    found = []
    for number, card in enumerate(cards, start=1):
        results = [result for result in card["results"] if result.get("weights_sha256") == sha256]
        if not results:
            steps = [str(result["step"]) for result in card["results"] if result.get("step") is not None]
            of = f"of step {', '.join(steps)}" if steps else "of other weights or of samples"
            raise UserError(
                f"--figures: card {number} has no figures of the weights that are exported, but {of}: measure these "
                "weights with trainer.evaluate --run RUN --card FILE"
            )
        found.append({**card, "results": results})
    return found


def _discriminator(run: Path, step: int | None) -> Mapping[str, Tensor]:
    """The discriminator of a snapshot, or of a checkpoint by its step."""
    if is_snapshot(run):
        judge = load_weights(run / DISCRIMINATOR) if (run / DISCRIMINATOR).is_file() else None
    else:
        storage = storage_of_run(run)
        judge = trained_discriminator(find_checkpoint(storage, step))
        storage.forget()
    if judge is None:
        raise UserError(f"--discriminator is given, but {run} has none: export from a run of the adversarial method")
    return judge


def _source(config: TrainConfig, digest: str | None) -> str | None:
    """What the training data was prepared from, if the prepared set is still where it was."""
    if is_remote(config.data.path):
        return None
    try:
        index = load_index(config.data.path)
    except (UserError, OperationError, OSError):
        return None
    return index.source if index.digest == digest else None
