"""Keeps the Unix sockets of multiprocessing in a folder whose path is short enough for them."""

import os
import shutil
import tempfile
from contextlib import suppress
from multiprocessing import process, util
from typing import Any

LONGEST_FOLDER = 107 - len("/pymp-12345678/listener-12345678")
"""Bytes in the path of the temporary folder. A socket's path may have 107, on Linux."""
_PLACES = ("/tmp", "/var/tmp", "/dev/shm")


def use_short_socket_folder() -> None:
    """Choose another folder for sockets if that of temporary files is too long for them. Child processes inherit it."""
    config: dict[str, Any] = process.current_process()._config  # pyright: ignore[reportAttributeAccessIssue]
    if "tempdir" in config or len(os.fsencode(tempfile.gettempdir())) <= LONGEST_FOLDER:
        return
    for place in _PLACES:
        with suppress(OSError):
            folder = tempfile.mkdtemp(prefix="pymp-", dir=place)
            util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
            config["tempdir"] = folder
            return
