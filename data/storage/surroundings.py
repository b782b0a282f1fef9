"""What a command needs of the process that it runs in, whatever the locale and the user."""

import io
import os
import pwd
import sys
import tempfile


def prepare_process() -> None:
    """Let all text be written, and give a nameless user a name and a home. Called once by every command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the locale cannot write is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:  # as in many containers; Python and libraries would raise it again
        os.environ.setdefault("LOGNAME", f"uid{os.getuid()}")
        if not os.access(os.environ.get("HOME") or "/nowhere", os.W_OK):
            os.environ["HOME"] = tempfile.gettempdir()
