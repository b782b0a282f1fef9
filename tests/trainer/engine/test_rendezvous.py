"""Who may join a group of ranks, and where its store listens."""

import os
import socket
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from subprocess import Popen

import pytest

from data.storage.errors import OperationError, UserError
from tests.launch import environment, run_python
from trainer.engine import rendezvous
from trainer.engine.rendezvous import SECRET_VARIABLE, is_one_host, job_secret, open_store, reserve


def test_the_store_listens_on_its_address_only() -> None:
    port = reserve("127.0.0.1")
    with ThreadPool(1) as other:
        joined = other.apply_async(open_store, ("127.0.0.1", port, 1, 2, 30))  # it waits for the server
        store = open_store("127.0.0.1", port, 0, 2, 30)
        store.set("key", "value")
        assert joined.get(30).get("key") == b"value"
        with socket.socket() as probe:  # another address of this machine
            assert probe.connect_ex(("127.0.0.2", port)) != 0


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(OperationError, match=r"rank 0 cannot listen at 192\.0\.2\.1:0.*MASTER_ADDR"):
        reserve("192.0.2.1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "192.0.2.1"}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1"}, False),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, True),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, True),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1"}, False),
    ],
)
def test_one_host_is_told_from_several(given: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert is_one_host() == expected


def test_ranks_of_one_user_and_host_share_a_secret_in_a_private_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    monkeypatch.setattr(rendezvous, "is_one_host", lambda: True)
    monkeypatch.setattr(rendezvous.tempfile, "gettempdir", lambda: str(tmp_path))
    with ThreadPool(8) as pool:
        found = set(pool.map(lambda _: job_secret(), range(8)))
    assert len(found) == 1 and len(found.pop()) == 64
    folder = tmp_path / f"ddgan-{os.getuid()}"
    assert [(file.name, file.stat().st_mode & 0o777) for file in folder.iterdir()] == [("ranks-secret", 0o600)]
    folder.chmod(0o755)
    with pytest.raises(UserError, match="is not a private folder of yours"):
        job_secret()


def test_several_hosts_need_a_secret_from_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "is_one_host", lambda: False)
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    with pytest.raises(UserError, match=f"{SECRET_VARIABLE} is not set"):
        job_secret()
    monkeypatch.setenv(SECRET_VARIABLE, "abc")
    assert job_secret() == b"abc"


def test_ranks_that_torchrun_starts_again_do_not_find_what_the_dead_ones_left(monkeypatch: pytest.MonkeyPatch) -> None:
    server = rendezvous.open_store("127.0.0.1", port := rendezvous.reserve("127.0.0.1"), 0, 1, 60)
    assert server.port == port
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    stores = []
    monkeypatch.setattr(rendezvous.dist, "init_process_group", lambda backend, *, store, **more: stores.append(store))
    for restart in ("0", "1"):
        for name, value in (place | {"TORCHELASTIC_RESTART_COUNT": restart}).items():
            monkeypatch.setenv(name, value)
        rendezvous.init_group("gloo", 1, 60)
        assert not stores[-1].check(["address of rank 0"])
        stores[-1].set("address of rank 0", "1.2.3.4:5")


VICTIM = "from trainer.engine.ranks import Ranks; Ranks.join('cpu', 60)"


@pytest.mark.slow
def test_a_stranger_in_a_ranks_place_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place["GLOO_SOCKET_IFNAME"] = "lo"
    mark = tmp_path / "executed"
    stranger = Popen(
        [sys.executable, "-m", "tests.trainer.engine.processes.stranger", str(port), str(mark)], env=environment(place)
    )
    try:
        done = run_python(["-c", VICTIM], env=place, timeout_s=120)
    finally:
        stranger.kill()
        stranger.wait()
    assert "OperationError: rank 1 does not know this job's secret" in done.stderr
    assert done.returncode != 0 and not mark.exists()
