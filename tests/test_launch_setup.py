"""The set-up by launch.sh: what it installs and when, and its messages on an unsuitable machine."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.front_door import INSTALLING, Machine, script, wait_for


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# ---- what is installed and when ----


def test_second_start_installs_nothing(machine: Machine) -> None:
    assert machine.launch("train", "--help", RECORD="1")[0] == 0
    assert machine.installs()[:-1] == ["venv", *INSTALLING]
    code, _, errors = machine.launch("train", "--help", RECORD="1")
    assert (code, errors) == (0, "")
    assert machine.installs() == [f"{machine.checkout}: [cluster.launch] [train] [--help]"]


def test_a_changed_lock_is_installed_into_the_same_environment(machine: Machine) -> None:
    machine.launch("test", RECORD="1")
    machine.calls()
    with (machine.checkout / "requirements.lock").open("a") as lock:
        lock.write("six==1.17.0\n")
    machine.launch("test", RECORD="1")
    assert machine.installs()[:3] == INSTALLING


def test_an_environment_made_by_hand_is_completed_and_kept(machine: Machine) -> None:
    (machine.venv / "bin").mkdir(parents=True)
    shutil.copy(machine.python, machine.venv / "bin/python")
    (machine.venv / "pyvenv.cfg").write_text("by hand")
    assert machine.launch("test", RECORD="1")[0] == 0
    assert machine.installs()[:3] == INSTALLING
    assert (machine.venv / "pyvenv.cfg").read_text() == "by hand"


def test_an_interrupted_set_up_is_made_again(machine: Machine, tmp_path: Path) -> None:
    killed = machine.start("test", RECORD="1", ON_INSTALL=f"touch {tmp_path}/installing; sleep 60")
    wait_for((tmp_path / "installing").exists)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    machine.calls()
    code, _, errors = machine.launch("test", RECORD="1")
    assert code == 0
    assert "did not end; making it again" in errors
    assert machine.installs()[:4] == ["venv", *INSTALLING]


def test_an_environment_whose_python_is_gone_is_made_again(machine: Machine) -> None:
    machine.launch("test", RECORD="1")
    machine.calls()
    script(machine.venv / "bin/python", "#!/nowhere/python\n")
    code, _, errors = machine.launch("test", RECORD="1")
    assert code == 0
    assert f"the Python or the pip of {machine.venv} does not run; making it again" in errors
    assert machine.installs()[:4] == ["venv", *INSTALLING]


def test_a_moved_checkout_is_installed_again(machine: Machine) -> None:
    machine.launch("test", RECORD="1")
    machine.calls()
    moved = machine.checkout.with_name("moved")
    machine.checkout.rename(moved)
    machine.checkout = moved
    machine.launch("test", RECORD="1")
    assert machine.installs()[:3] == INSTALLING


def test_two_at_the_same_time_install_once(machine: Machine, tmp_path: Path) -> None:
    started = tmp_path / "installing"
    first = machine.start("test", RECORD="1", ON_INSTALL=f"touch {started}; sleep 0.5")
    wait_for(started.exists)
    code, _, errors = machine.launch("test", RECORD="1")
    first.communicate(timeout=60)
    assert (first.returncode, code) == (0, 0)
    assert f"waiting for another launch.sh that sets up {machine.venv}" in errors
    assert [line for line in machine.installs() if "[" not in line] == ["venv", *INSTALLING]


def test_a_folder_that_is_no_environment_is_refused_and_kept(machine: Machine, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    code, _, errors = machine.launch("test", DDGAN_VENV=str(precious))
    assert code == 2
    assert f"{precious} holds something else than a virtual environment" in errors
    assert list(precious.iterdir()) == [precious / "thesis.tex"]


def test_pythons_own_environment_is_relative_to_the_callers_folder(machine: Machine) -> None:
    machine.launch("test", RECORD="1", DDGAN_VENV="own/")
    assert (machine.elsewhere / "own/ddgan-setup").is_file()


# ---- unsuitable machines ----


def test_a_python_that_is_too_old_is_named_with_the_way_out(machine: Machine, tmp_path: Path) -> None:
    old = script(tmp_path / "python3", "#!/bin/sh\necho 3.9.18\n")
    code, output, errors = machine.launch("test", PYTHON=str(old))
    assert (code, output) == (2, "")
    assert f"{old} is Python 3.9.18, too old. 3.11 or later is needed" in errors
    assert "PYTHON=/path/to/python3.11 ./launch.sh" in errors
    assert not machine.venv.exists()


def test_a_python_that_is_not_there_is_named(machine: Machine) -> None:
    code, _, errors = machine.launch("test", PYTHON="/nowhere/python3")
    assert code == 2
    assert "no usable Python; none of /nowhere/python3 runs" in errors


def test_the_first_python_that_fits_is_taken(machine: Machine, tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "python3.13", "#!/bin/sh\nexit 127\n")  # like the shims of version managers
    script(folder / "python3.12", '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\necho 3.12.1\n')
    shutil.copy(machine.python, folder / "python3.11")
    code, _, errors = machine.launch("test", RECORD="1", PYTHON="", PATH=f"{folder}:{os.environ['PATH']}")
    assert code == 0, errors
    assert "with python3.11 (3." in errors
    (folder / "python3.11").unlink()
    script(folder / "python3.11", "#!/bin/sh\nexit 1\n")
    script(folder / "python3", "#!/bin/sh\necho 3.10.2\n")
    variables = {"PYTHON": "", "PATH": f"{folder}:{os.environ['PATH']}", "DDGAN_VENV": "other"}
    code, _, errors = machine.launch("test", RECORD="1", **variables)
    assert code == 2
    assert "python3.12 (3.12.1) lacks venv or ensurepip, on Debian the package python3.12-venv" in errors
    assert "python3 is Python 3.10.2, too old" in errors


def test_an_environment_of_another_python_is_refused(machine: Machine, tmp_path: Path) -> None:
    machine.launch("test", RECORD="1")
    other = script(tmp_path / "python3.99", "#!/bin/sh\necho 3.99.0\n")
    code, _, errors = machine.launch("test", RECORD="1", PYTHON=str(other))
    assert code == 2
    assert f"but PYTHON={other} is 3.99.0" in errors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An 8 MB file system."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_told_before_anything_is_installed(machine: Machine, small_disk: Path) -> None:
    venv = small_disk / "venv"
    code, _, errors = machine.launch("test", DDGAN_VENV=str(venv))
    assert (code, machine.calls()) == (2, [])
    assert f"the disk of {venv} has 8 MB free, set-up needs 4 GB" in errors
    assert not venv.exists()


def test_a_disk_that_fills_up_during_set_up_is_told(machine: Machine, small_disk: Path) -> None:
    write = f"dd if=/dev/zero of='{small_disk}/file' bs=1M count=9 2>&1; exit 1"  # pip reports the same error as dd
    code, _, errors = machine.launch("test", RECORD="1", ON_INSTALL=write, TMPDIR=str(small_disk))
    assert code == 1
    assert "the disk became full during set-up: " in errors
    assert f"0 MB for temporary files in {small_disk}" in errors
    (small_disk / "file").unlink()
    code, _, errors = machine.launch("test", RECORD="1")
    assert code == 0, "the same command again begins again"
    assert "did not end; making it again" in errors


def test_a_machine_without_network_is_told_in_one_line(machine: Machine) -> None:
    words = (
        "echo \"WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError: Failed to establish "
        "a new connection'\"; echo 'ERROR: No matching distribution found for setuptools'; exit 1"
    )
    code, _, errors = machine.launch("test", RECORD="1", ON_INSTALL=words)
    assert code == 1
    assert "launch.sh: pip reached no package index: check the network" in errors.splitlines()[-1]
    log = machine.venv / "ddgan-setup.log"
    assert str(log) in errors.splitlines()[-1]
    assert "NewConnectionError" in log.read_text()
    machine.calls()
    assert machine.launch("test", RECORD="1")[0] == 0
    assert machine.installs()[:3] == INSTALLING, "nothing was half installed, so the environment is kept"


def test_any_other_failure_of_pip_is_told_with_its_last_words(machine: Machine) -> None:
    words = "echo 'ERROR: ResolutionImpossible: a, b'; echo 'hint'; exit 1"
    code, _, errors = machine.launch("test", RECORD="1", ON_INSTALL=words)
    assert code == 1
    assert "launch.sh: pip failed: ERROR: ResolutionImpossible: a, b; pip's log is" in errors.splitlines()[-1]
