"""Who may read the folder of a run."""

import grp
import os
import stat

import pytest

from trainer.config.draft import ConfigError
from trainer.config.sections import RunConfig
from trainer.rank.run_folder import make_run_directory


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_folder_and_its_new_parents_are_their_owners(tmp_path):
    tmp_path.chmod(0o755)
    made = make_run_directory(RunConfig(directory=str(tmp_path / "runs" / "mine")))
    assert (mode(made), mode(made.parent), mode(tmp_path)) == (0o700, 0o700, 0o755)


def test_a_loose_umask_changes_nothing(tmp_path):
    before = os.umask(0)
    try:
        made = make_run_directory(RunConfig(directory=str(tmp_path / "mine")))
    finally:
        os.umask(before)
    assert mode(made) == 0o700


def test_a_group_may_read_if_it_is_asked_for(tmp_path):
    own = grp.getgrgid(os.getgid())
    made = make_run_directory(RunConfig(directory=str(tmp_path / "mine"), group=own.gr_name))
    assert (mode(made), made.stat().st_gid) == (0o2750, own.gr_gid)
    (made / "inside").mkdir()
    assert (made / "inside").stat().st_gid == own.gr_gid


def test_a_folder_that_is_there_keeps_its_permissions(tmp_path):
    there = tmp_path / "mine"
    there.mkdir()
    there.chmod(0o755)
    make_run_directory(RunConfig(directory=str(there)))
    assert mode(there) == 0o755


def test_an_unknown_group_is_named_and_nothing_made(tmp_path):
    with pytest.raises(ConfigError, match=r"run.group is nosuchgroup, which does not exist on this machine.*`id -Gn`"):
        make_run_directory(RunConfig(directory=str(tmp_path / "mine"), group="nosuchgroup"))
    assert not (tmp_path / "mine").exists()


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="which cannot be written: Not a directory"):
        make_run_directory(RunConfig(directory=str(tmp_path / "file" / "mine")))
