"""Ends a child process when its parent ends."""

import os
import threading
from multiprocessing import connection, parent_process


def end_with_parent() -> None:
    """Start a thread that ends this process as soon as its parent has ended, for whatever reason."""
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
