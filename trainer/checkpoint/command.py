"""Look after checkpoints: `python -m trainer.checkpoint list | verify | prune | convert | export DIR`.

DIR is the directory of a run, or a folder or URL of checkpoints. Exit code 0: done; 1: a checkpoint is bad; 2: the
command cannot be carried out.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from data.storage.arguments import whole_number
from data.storage.errors import as_command
from data.storage.location import is_remote
from data.storage.paths import location_argument
from trainer.checkpoint.format import Checkpoint, CheckpointError
from trainer.checkpoint.lease import launch_id
from trainer.checkpoint.lease_places import claim_folder
from trainer.checkpoint.retention import Retention, is_remains, kept_steps, saved
from trainer.checkpoint.storage import CheckpointStorage, find_checkpoint, newest_fetched, open_storage, storage_of_run
from trainer.checkpoint.whole import convert, export

_COLUMNS = ("step", "images", "ranks", "ZeRO g/d", "MB", "created", "files")


@as_command(failed=2)
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    storage = _open(options.directory)
    return COMMANDS[options.command](storage, options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer.checkpoint", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "list": "a table of the checkpoints; compares sizes, reads no tensors",
        "verify": "hash everything; exit code 1 if something is damaged",
        "prune": "delete all but what the rules keep, and never the last valid one",
        "convert": "rewrite one checkpoint as a single file, independent of ranks and ZeRO",
        "export": "write the averaged generator as safetensors, with its config",
    }
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in texts.items()}
    for command in parsers.values():
        command.add_argument(
            "directory",
            type=location_argument,
            metavar="DIR",
            help="directory of a run, or folder or URL of checkpoints",
        )
    prune = parsers["prune"]
    prune.add_argument("--keep-last", type=whole_number(1), default=2, metavar="N", help="newest to keep (default 2)")
    prune.add_argument("--keep-every-images", type=whole_number(1), metavar="M", help="one of each M images stays")
    prune.add_argument("--keep-best", metavar="METRIC", help="the best one by this metric of its manifest stays")
    prune.add_argument("--keep-best-mode", choices=("min", "max"), default="min", help="what is best (default min)")
    prune.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")
    for name in ("convert", "export"):
        parsers[name].add_argument("--out", type=location_argument, required=True, help="folder for the result")
        parsers[name].add_argument("--step", type=whole_number(1), help="which checkpoint (default: the newest valid)")
    return parser.parse_args(arguments)


def _open(directory: str) -> CheckpointStorage:
    if is_remote(directory):
        return open_storage(directory)
    path = Path(directory)
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder")
    return (
        storage_of_run(path)
        if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir()
        else open_storage(path)
    )


def _list(storage: CheckpointStorage, _: argparse.Namespace) -> int:
    found = storage.list()
    rows = [_row(storage, checkpoint) for checkpoint in found]
    rows += [
        (name.removeprefix("step-").lstrip("0") or "0", *[""] * (len(_COLUMNS) - 2), "no valid manifest: no checkpoint")
        for name in storage.names()
        if name not in {checkpoint.path.name for checkpoint in found}
    ]
    if not rows:
        print(f"{storage.shown} holds no checkpoint")
        return 0
    widths = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS))]
    for row in [_COLUMNS, *sorted(rows, key=lambda row: int(row[0]))]:
        print("  ".join(text.rjust(width) for text, width in zip(row[:-1], widths, strict=False)) + f"  {row[-1]}")
    return 0


def _row(storage: CheckpointStorage, checkpoint: Checkpoint) -> tuple[str, ...]:
    manifest = checkpoint.manifest
    try:
        storage.check_sizes(checkpoint)
        files = "all there"
    except CheckpointError as error:
        files = str(error)
    stages = manifest.get("zero_stages", {})
    return (
        str(checkpoint.step),
        str(manifest.get("images", "")),
        str(manifest["world_size"]),
        f"{stages.get('g', '?')}/{stages.get('d', '?')}",
        f"{checkpoint.num_bytes / 1e6:.1f}",
        str(manifest.get("created", "")),
        files,
    )


def _verify(storage: CheckpointStorage, _: argparse.Namespace) -> int:
    found = storage.list()
    broken = sorted(set(storage.names()) - {checkpoint.path.name for checkpoint in found})
    for name in broken:
        print(f"{name}  no valid manifest: no checkpoint")
    bad = 0
    for checkpoint in found:
        try:
            storage.fetch(checkpoint)
            print(f"{checkpoint.path.name}  good")
        except CheckpointError as error:
            bad += 1
            print(f"{checkpoint.path.name}  BAD: {error}")
    storage.forget()
    unreadable = [name for name in broken if storage.manifest(name) is not None]
    return 1 if bad or unreadable else 0


def _prune(storage: CheckpointStorage, options: argparse.Namespace) -> int:
    rules = Retention(
        keep_last=options.keep_last,
        keep_every_images=options.keep_every_images,
        keep_best=options.keep_best,
        keep_best_mode=options.keep_best_mode,
    )
    held = claim_folder(storage.location, launch_id())
    try:
        found = storage.list()
        if not found:
            raise CheckpointError(f"{storage.shown} holds no checkpoint: nothing is deleted")
        newest = newest_fetched(storage)
        storage.forget()
        if newest is None:
            raise CheckpointError(f"{storage.shown} holds no valid checkpoint: nothing is deleted")
        kept = kept_steps([saved(checkpoint, rules) for checkpoint in found], rules) | {newest.step}
        listed = {checkpoint.path.name: checkpoint.step for checkpoint in found}
        for name in storage.names():
            if listed[name] not in kept if name in listed else is_remains(storage, name):
                print(f"{'would delete' if options.dry_run else 'deleting'} {storage.shown}/{name}")
                if not options.dry_run:
                    storage.delete(name)
    finally:
        held.release()
    return 0


def _convert(storage: CheckpointStorage, options: argparse.Namespace) -> int:
    target = open_storage(options.out)
    name = convert(find_checkpoint(storage, options.step), target)
    storage.forget()
    print(f"{target.shown}/{name}")
    return 0


def _export(storage: CheckpointStorage, options: argparse.Namespace) -> int:
    folder = export(find_checkpoint(storage, options.step), Path(options.out))
    storage.forget()
    print(folder)
    return 0


COMMANDS = {"list": _list, "verify": _verify, "prune": _prune, "convert": _convert, "export": _export}
