"""The commands of `python -m data.prepare` for prepared data sets: `inspect`, `verify`, `push`, `pull`, `merge`."""

import argparse

from rich.console import Console

from data.sets.arguments import default_workers
from data.shards.index import ShardIndex, load_index
from data.storage.errors import OperationError
from data.storage.location import DataError
from data.storage.redaction import redact

# The work of each command is imported when it is given: a preparation needs neither a reader nor a decoder.


def run(arguments: argparse.Namespace, out: Console, err: Console) -> int:
    """Run one of `COMMANDS`; return its exit code.

    Args:
        arguments: parsed; `command` is its name.
        out: prints results.
        err: shows progress bars.
    """
    commands = {"inspect": _inspect, "verify": _verify, "push": _push, "pull": _pull, "merge": _merge}
    return commands[arguments.command](arguments, out, err)


def _inspect(arguments: argparse.Namespace, out: Console, err: Console) -> int:
    from data.sets.inspect import inspect

    index = load_index(arguments.directory)
    against = None if arguments.against is None else load_index(arguments.against)
    try:
        out.print(inspect(index, arguments.sheet, err, against=against, workers=_workers(arguments, index)))
    except DataError as error:
        raise OperationError(str(error)) from error
    return 0


def _verify(arguments: argparse.Namespace, out: Console, err: Console) -> int:
    from data.sets.verify import audit

    index = load_index(arguments.directory)
    return 0 if audit(index, _workers(arguments, index), out, err) else 1


def _push(arguments: argparse.Namespace, out: Console, err: Console) -> int:
    from data.sets.transfer import push

    copied, num_bytes = push(
        arguments.directory, arguments.url, workers=arguments.workers, check=arguments.check, console=err
    )
    _tell(arguments.url, copied, num_bytes, out)
    return 0


def _pull(arguments: argparse.Namespace, out: Console, err: Console) -> int:
    from data.sets.transfer import pull

    copied, num_bytes = pull(arguments.url, arguments.directory, workers=arguments.workers, console=err)
    _tell(arguments.directory, copied, num_bytes, out)
    return 0


def _merge(arguments: argparse.Namespace, out: Console, err: Console) -> int:
    from data.sets.merge import merge

    merged = merge(arguments.directories, arguments.out, err)
    index, rewritten = merged.index, merged.num_rewritten
    if merged.was_there:
        out.print(f"{index.location} already holds this data set ({index.num_samples} images); nothing to do")
        return 0
    classes = "no classes" if index.class_names is None else f"{index.num_classes} classes"
    kept = len(index.shards) - rewritten
    out.print(
        f"{index.location}: {index.num_samples} images, {classes}; {kept} shards taken as they are, "
        f"{rewritten} written anew for other labels or keys"
    )
    return 0


def _workers(arguments: argparse.Namespace, index: ShardIndex) -> int:
    return default_workers(index.num_samples) if arguments.workers is None else arguments.workers


def _tell(place: str, copied: int, num_bytes: int, out: Console) -> None:
    index = load_index(place)
    done = f"{copied} files with {num_bytes} bytes copied" if copied else "nothing to do"
    out.print(f"{redact(place)}: {index.num_samples} images in {len(index.shards)} shards; {done}")
