"""Small things that everybody does with files and times."""

import json
import os
import time
from pathlib import Path
from typing import Any


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write or replace a JSON file: on the disk as a whole, or the one that was there before."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    unfinished.replace(file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def timestamp() -> str:
    """Now, in UTC, for the manifest."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
