"""Commands run in any locale and for users without a name."""

import os
import pwd
import subprocess
import sys

import pytest

from data.storage.surroundings import prepare_process
from tests.launch import ROOT, environment


def test_user_without_an_entry_gets_a_name_and_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path):
    def unknown(_uid: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(os, "environ", {"HOME": "/proc", "TMPDIR": str(tmp_path)})
    prepare_process()
    assert os.environ["LOGNAME"] == f"uid{os.getuid()}"
    assert os.access(os.environ["HOME"], os.W_OK)
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path), "LOGNAME": "me"})
    prepare_process()
    assert os.environ == {"HOME": str(tmp_path), "LOGNAME": "me"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_name_that_the_locale_cannot_write_is_written_escaped(encoding):
    code = (
        "from data.storage.errors import UserError, as_command\n"
        "@as_command()\n"
        "def main():\n    print('\\u732b'); raise UserError('no such folder: \\u732b')\n"
        "raise SystemExit(main())"
    )
    variables = environment({"PYTHONIOENCODING": encoding})
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "\\u732b\n", "no such folder: \\u732b\n")
