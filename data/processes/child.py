"""What every process that we start does: end with its parent."""

import os
import threading
from multiprocessing import connection, parent_process


def end_with_parent() -> None:
    """End this process, from a thread, as soon as the one that asked for it is gone, however that ended."""
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()


def _exit_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
