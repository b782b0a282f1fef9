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


NAMELESS = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
"""Runs a command as a user who has no name, and may read and write what we may."""
TINY = ("generator.base_channels=8", "discriminator.base_channels=4", "training.total_images=32", "grids.num_images=4")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_commands_run_for_a_user_without_a_name_or_home_whose_terminal_cannot_write_their_paths(tmp_path, encoding):
    variables = environment({"PYTHONIOENCODING": encoding, "LC_ALL": "C"})
    for name in ("HOME", "LOGNAME", "USER"):
        variables.pop(name, None)

    def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        line = [*NAMELESS, sys.executable, *map(os.fsencode, arguments)]
        return subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, timeout=300)

    if run("-c", "import os, pwd; pwd.getpwuid(os.getuid())").stderr.count(b"uid not found") != 1:
        pytest.skip("this system allows no user namespaces")
    prepared = run("-m", "data.prepare", "digits", "--out", f"{tmp_path}/gr\xf6\xdfe-\u732b", "--workers", "0")
    assert prepared.returncode == 0 and not prepared.stderr, prepared
    places = (f"data.path={tmp_path}/gr\xf6\xdfe-\u732b", f"run.directory={tmp_path}/lauf-\u732b", *TINY)
    settings = (word for setting in (*places, "tracking.backends=[]") for word in ("--set", setting))
    trained = run("-m", "trainer.worker", "--config", "digits", *settings)
    assert trained.returncode == 0 and b"finished at step 1" in trained.stderr, trained
    assert b"Traceback" not in trained.stderr + trained.stdout
