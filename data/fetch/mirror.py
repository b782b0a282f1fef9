"""Local copies of files at a URL, for what can be read from a disk only."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from data.fetch.downloads import Report, download, downloads_folder, locked
from data.storage.errors import UserError
from data.storage.location import DataError
from data.storage.redaction import redact
from data.storage.remote_folder import RemoteFile, RemoteFolder


def mirror_file(url: str, report: Report) -> Path:
    """The local copy of one file, which is brought up to date.

    Raises:
        UserError: it cannot be read, or not be kept.
    """
    parent, _, name = url.rpartition("/")
    storage = RemoteFolder(parent)
    return mirror_files(storage, {name: storage.ask(name)}, report, part=name) / name


def mirror_files(storage: RemoteFolder, files: Mapping[str, RemoteFile], report: Report, *, part: str = "") -> Path:
    """A local folder with copies of some files of a remote one, under their names there, and with no others.

    Copies that are up to date stay.

    Args:
        storage: the remote folder.
        files: what it says about each file; the names must not lead out of the folder.
        report: is told the progress.
        part: tells different parts of one folder apart; each has its own copies.

    Raises:
        UserError: one cannot be read, or not be kept.
    """
    # The place tells two folders of one name apart; the name is what the prepared data set will be called after.
    place = hashlib.sha256(f"{storage.url} {part}".encode()).hexdigest()[:16]
    folder = downloads_folder() / "urls" / place / redact(storage.url).rpartition("/")[2]
    try:
        with locked(folder.parent):
            for file in folder.rglob("[!.]*"):
                if file.is_file() and file.relative_to(folder).as_posix() not in files:
                    file.unlink()
            for name, remote in files.items():
                download(storage, name, folder / name, remote=remote, report=report)
    except DataError as error:
        raise DataError(f"{error}. What has arrived stays: give the same command again") from None
    except OSError as error:
        raise UserError(
            f"{storage.url}: cannot be copied to {folder}: {error.strerror or error}; free some space, or set "
            "XDG_CACHE_HOME to a folder of another disk"
        ) from None
    return folder
