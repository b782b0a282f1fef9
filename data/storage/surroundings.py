"""What a command needs of the process that it runs in, whatever the locale and the user."""

import io
import os
import platform
import pwd
import sys
import tempfile
from pathlib import Path


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


def processor() -> str:
    """The model of this machine's processor and the number of CPUs that this process may use, in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{model}, {len(os.sched_getaffinity(0))} CPUs"
