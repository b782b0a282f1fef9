"""`python -m data.prepare push DIR URL` and `pull URL DIR`: copy a prepared data set, and check every file's hash.

index.json comes last, so that an unfinished copy is no data set. A repeated command copies what is missing or differs.
origin.json, which no image depends on, goes along where it is there.
"""

import contextlib
import errno
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Literal

from rich.console import Console

from data.sets.origin import ORIGIN_NAME, load_origin, parse_origin
from data.sets.terminal import bytes_bar
from data.sets.work_folder import OutputError, WorkFolder, remove_emptied
from data.shards.files import fetch
from data.shards.index import INDEX_NAME, DataFile, ShardIndex, parse_index
from data.shards.verification import is_intact
from data.storage.errors import OperationError, StoppedError
from data.storage.files import replaced
from data.storage.location import DataError, is_remote, local_path
from data.storage.redaction import redact
from data.storage.remote import AbandonedError, Advance, Storage
from data.storage.remote_folder import RemoteFolder
from data.storage.writable import StorageError, WritableStorage

MARK_NAME = "index.json.unfinished"
"""At a URL, the index of a data set that is being copied there."""
_CHUNK_BYTES = 2**23
_READ_ONLY = ("http", "https")
Copied = tuple[int, int]
"""Files that were copied, and their bytes."""


def push(directory: str, url: str, *, workers: int, check: Literal["hash", "size"], console: Console) -> Copied:
    """Copy a prepared data set to a URL.

    Args:
        directory: its folder.
        url: an empty place, or one with a whole or unfinished copy of the same data set.
        workers: files copied at a time.
        check: "hash" reads back each file at the URL; "size" compares sizes only.
        console: shows the progress bar.

    Raises:
        DataError: there is no data set, or the URL cannot be used.
        OutputError: something else is at the URL.
        OperationError: a file could not be copied, or did not arrive as it should.
    """
    content, index = _local_index(directory)
    if not is_remote(url):
        raise OutputError(f"{url} is no URL: to copy to another folder of this machine, use cp -r")
    target = WritableStorage(url)
    if target.url.partition("://")[0] in _READ_ONLY:
        raise OutputError(f"{redact(url)}: a web server takes no files; give s3:// or other storage")
    try:
        sizes = target.retried(INDEX_NAME, target.files)
        is_whole = _refuse_other_set(target, sizes, index, content)
        wrong = [file for file in index.files if sizes.get(file.name) != file.num_bytes]
        origin = _origin_to_send(target, index.directory, is_there=ORIGIN_NAME in sizes)
        if is_whole and not wrong and origin is None and check == "size":
            return 0, 0
        if not is_whole:
            target.retried(MARK_NAME, lambda: target.put(MARK_NAME, content))
    except StorageError as error:
        raise DataError(str(error)) from error

    def copy(file: DataFile, stop: threading.Event, advance: Advance) -> bool:
        if file not in wrong:
            if check == "size" or _arrived(target, file, stop, advance):
                return False
            advance(-file.num_bytes)
        if check == "hash":
            send(target, index.directory, file, stop, advance)
        else:
            target.retried(file.name, lambda: _upload(target, index.directory, file, stop, advance), stop)
        return True

    copied = _in_parallel(copy, index.files, workers, "pushing", console)
    try:
        if origin is not None:
            copied = _send_origin(target, origin, copied)
        if not is_whole:
            target.retried(INDEX_NAME, lambda: target.put(INDEX_NAME, content))
            target.retried(MARK_NAME, lambda: target.remove([MARK_NAME]))
    except StorageError as error:
        raise OperationError(f"{error}; the same command continues") from error
    return copied


def send(
    target: WritableStorage,
    folder: Path,
    file: DataFile,
    stop: threading.Event,
    advance: Advance = lambda num_bytes: None,
) -> None:
    """Copy a file to a URL, and read it back.

    Args:
        target: where it goes, under its name.
        folder: where it is.
        file: its size and hash.
        stop: ends the transfer when set.
        advance: told of the bytes that are sent.

    Raises:
        DataError: the file is not what its hash says.
        StorageError: it could not be written or read.
        OperationError: something else arrived.
        AbandonedError: `stop` was set.
    """
    target.retried(file.name, lambda: _upload(target, folder, file, stop, advance), stop)
    if not _arrived(target, file, stop, lambda _: None):
        raise OperationError(f"{file.title}: what arrived at {target.url} differs; give the command again")


def pull(url: str, directory: str, *, workers: int, console: Console) -> Copied:
    """Copy a prepared data set from a URL to a folder.

    Args:
        url: of the data set.
        directory: missing, empty, or a copy of the same data set, of which missing and altered files are copied again.
        workers: files copied at a time.
        console: shows the progress bar.

    Raises:
        DataError: there is no data set at the URL.
        OutputError: something else is in the folder, or another process copies to it.
        OperationError: a file could not be copied.
        OSError: a file could not be written.
    """
    if not is_remote(url):
        raise OutputError(f"{url} is no URL: to copy from another folder of this machine, use cp -r")
    storage = RemoteFolder(url)
    content = storage.read(INDEX_NAME)
    index = parse_index(content, storage.url)
    target = local_path(directory).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        return _mend(storage, index, content, target, workers, console)
    with WorkFolder(target) as work:
        work.journal.unlink(missing_ok=True)
        work.discard(keep=frozenset(file.name for file in index.files))
        _refuse_full_disk(index.files, work.result)
        try:
            copied = _download(storage, index, work.result, workers, console)
            copied = _bring_origin(storage, index, work.result, copied, console)
            with replaced(work.result / INDEX_NAME, durable=True, draft=f"{INDEX_NAME}.unfinished") as draft:
                draft.write_bytes(content)
            work.publish()
        except KeyboardInterrupt:
            raise StoppedError(f"interrupted; the same command continues with what is in {work.path}") from None
    remove_emptied(target)
    return copied


def _mend(
    storage: RemoteFolder, index: ShardIndex, content: bytes, target: Path, workers: int, console: Console
) -> Copied:
    """Copy again what is missing or altered in a whole data set."""
    advice = "choose another folder, or remove it yourself"
    if not target.is_dir() or not (target / INDEX_NAME).is_file():
        raise OutputError(f"{target} holds other files; {advice}")
    if (target / INDEX_NAME).read_bytes() != content:
        raise OutputError(f"{target} holds another prepared data set than {index.shown_location}; {advice}")
    copied = _download(storage, index, target, workers, console)
    return _bring_origin(storage, index, target, copied, console)


def _download(storage: Storage, index: ShardIndex, folder: Path, workers: int, console: Console) -> Copied:
    def copy(file: DataFile, stop: threading.Event, advance: Advance) -> bool:
        if is_intact(folder, file):
            advance(file.num_bytes)
            return False
        with replaced(folder / file.name, durable=True, draft=f"{file.name}.unfinished") as draft:
            fetch(storage, file, draft, stop=stop, advance=advance)
        return True

    return _in_parallel(copy, index.files, workers, "pulling", console)


def _origin_to_send(target: WritableStorage, folder: Path, *, is_there: bool) -> bytes | None:
    """The local origin.json, unless there is none, or the one at the URL is of the same images."""
    try:
        content = (folder / ORIGIN_NAME).read_bytes()
    except OSError:
        return None
    if (own := parse_origin(content)) is None:
        return None
    there = target.retried(ORIGIN_NAME, lambda: target.read_if_there(ORIGIN_NAME)) if is_there else None
    return None if own.is_of_the_images_of(parse_origin(there)) else content


def _send_origin(target: WritableStorage, content: bytes, copied: Copied) -> Copied:
    """Write origin.json to a URL, and read it back; returns what was copied with it."""
    target.retried(ORIGIN_NAME, lambda: target.put(ORIGIN_NAME, content))
    if target.retried(ORIGIN_NAME, lambda: target.read_if_there(ORIGIN_NAME)) != content:
        raise OperationError(f"{ORIGIN_NAME}: what arrived at {target.url} differs; give the command again")
    return copied[0] + 1, copied[1] + len(content)


def _bring_origin(storage: RemoteFolder, index: ShardIndex, folder: Path, copied: Copied, console: Console) -> Copied:
    """Copy origin.json from a URL where it is there; returns what was copied with it. Images do not wait for it."""
    try:
        content = storage.content(ORIGIN_NAME)
        if content is None:
            return copied
        origin = parse_origin(content)
        if origin is None or origin.num_images > index.num_samples:
            raise DataError(f"{ORIGIN_NAME} at {index.shown_location} is damaged; push the data set again")
        if origin.is_of_the_images_of(load_origin(folder)):
            return copied
        with replaced(folder / ORIGIN_NAME, durable=True, draft=f"{ORIGIN_NAME}.unfinished") as draft:
            draft.write_bytes(content)
    # Some storage refuses access to files that are not there.
    except (DataError, OSError) as error:
        console.print(f"data.prepare: no {ORIGIN_NAME} is copied, and inspect shows no sizes of originals: {error}")
        return copied
    return copied[0] + 1, copied[1] + len(content)


def _local_index(directory: str) -> tuple[bytes, ShardIndex]:
    """The bytes of the index.json of a local data set, and the index."""
    if is_remote(directory):
        raise OutputError(f"{redact(directory)} is a URL: pull it first, then push the folder")
    folder = local_path(directory)
    try:
        content = (folder / INDEX_NAME).read_bytes()
    except OSError as error:
        raise DataError(f"no prepared data set at {folder}: {INDEX_NAME}: {error.strerror}") from None
    return content, parse_index(content, str(folder))


def _refuse_other_set(target: WritableStorage, sizes: dict[str, int], index: ShardIndex, content: bytes) -> bool:
    """Whether a whole copy of this data set is there; refuses anything else but an unfinished copy of it."""
    advice = "choose another URL, or remove it yourself"
    for name, what in (
        (INDEX_NAME, "another prepared data set"),
        (MARK_NAME, "an unfinished copy of another data set"),
    ):
        if name in sizes:
            if target.retried(name, lambda name=name: target.read_if_there(name)) != content:
                raise OutputError(f"{target.url} holds {what}; {advice}")
            return name == INDEX_NAME
    foreign = sorted(sizes)
    if foreign:
        raise OutputError(f"{target.url} holds other files, such as {foreign[0]}; {advice}")
    return False


def _refuse_full_disk(files: Sequence[DataFile], folder: Path) -> None:
    present = sum(file.stat().st_size for file in folder.iterdir())
    needed, free = sum(file.num_bytes for file in files) - present, shutil.disk_usage(folder).free
    if needed > free:
        raise OperationError(
            f"the disk of {folder.parent} is too full: {needed} bytes are still to be copied, {free} are free; free "
            "some space or choose another disk"
        )


def _upload(target: WritableStorage, folder: Path, file: DataFile, stop: threading.Event, advance: Advance) -> None:
    """Send a file, and check meanwhile that it is what the index says."""
    sent, digest = 0, hashlib.sha256()

    def chunks() -> Iterator[memoryview]:
        nonlocal sent
        with (folder / file.name).open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                if stop.is_set():
                    raise AbandonedError
                digest.update(chunk)
                yield memoryview(chunk)
                sent += len(chunk)
                advance(len(chunk))
        if digest.hexdigest() != file.sha256:
            raise DataError(
                f"{file.title}: {folder / file.name} was altered: its SHA-256 is {digest.hexdigest()}, the index says "
                f"{file.sha256}; copy it again, or prepare the data set again"
            )

    try:
        target.write(file.name, chunks())
    except BaseException:
        advance(-sent)
        raise


def _arrived(target: WritableStorage, file: DataFile, stop: threading.Event, advance: Advance) -> bool:
    """Read a file back and compare its hash."""

    def found() -> str:
        digest, read = hashlib.sha256(), 0
        try:
            for chunk in target.chunks(file.name):
                if stop.is_set():
                    raise AbandonedError
                digest.update(chunk)
                read += len(chunk)
                advance(len(chunk))
        except BaseException:
            advance(-read)
            raise
        return digest.hexdigest()

    return target.retried(file.name, found, stop) == file.sha256


def _in_parallel(
    copy: Callable[[DataFile, threading.Event, Advance], bool],
    files: Sequence[DataFile],
    workers: int,
    title: str,
    console: Console,
) -> Copied:
    """Call `copy` for each file in threads; the first error ends all of them."""
    stop, copied = threading.Event(), (0, 0)
    with bytes_bar(console) as progress, contextlib.ExitStack() as stack:
        task = progress.add_task(title, total=sum(file.num_bytes for file in files))

        def advance(num_bytes: int) -> None:
            progress.advance(task, num_bytes)

        executor = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix=title))
        stack.callback(executor.shutdown, cancel_futures=True)
        stack.callback(stop.set)
        work = {executor.submit(copy, file, stop, advance): file for file in files}
        for future in as_completed(work):
            try:
                if future.result():
                    copied = (copied[0] + 1, copied[1] + work[future].num_bytes)
            except (DataError, StorageError) as error:
                raise OperationError(f"{error}; the same command continues") from error
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise OperationError(
                        f"the disk is full after {copied[0]} of {len(files)} files; free some space, and the same "
                        "command continues"
                    ) from None
                raise
    return copied
