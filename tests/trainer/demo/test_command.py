"""`python -m trainer.demo` from its start to Ctrl-C, and what it says of mistakes."""

import importlib.util
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT, default_signals, environment
from tests.trainer.demo.served import Client, untrained
from trainer.checkpoint.snapshot import build_generator, save_snapshot
from trainer.config.io import load_config
from trainer.demo.command import main


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    generator, _, config = untrained([*tiny])
    return save_snapshot(tmp_path_factory.mktemp("run") / "mine", generator.state_dict(), config, step=0)


@pytest.mark.slow
def test_it_prints_an_address_of_this_machine_alone_and_ends_with_ctrl_c_even_while_it_draws(run: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.demo", "--run", str(run)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]{22})/ \(stop with Ctrl-C\)\n", line)
        assert found, line
        client = Client(int(found[1]))
        assert client.ask(f"/{found[2]}/")[0] == 200
        with socket.socket() as probe:  # another address of this machine
            assert probe.connect_ex(("127.0.0.2", client.port)) != 0
        with socket.create_connection(("127.0.0.1", client.port)) as connection:
            path = f"/{found[2]}/edit?way=variations&num=64&resample=20&start=3"  # takes seconds
            picture = (ROOT / "docs/images/digits.png").read_bytes()
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(picture)}\r\n\r\n"
            connection.sendall(head.encode() + picture)
            assert client.ask(f"/{found[2]}/model")[0] == 200  # the request above has come
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_a_taken_port_is_told(run: Path, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--run", str(run), "--port", str(port)]) == 2
    said = f"--port is {port}, Address already in use: give another one, or leave it out for one that is free\n"
    assert capsys.readouterr() == ("", said)


def test_a_missing_library_is_told_with_the_line_that_installs_it(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("trainer.demo.command.find_spec", lambda name: None if name == "uvicorn" else importlib.util)
    assert main(["--run", str(run)]) == 2
    assert capsys.readouterr().err == (
        "the page needs uvicorn, which this Python does not have: install the extra demo, pip install '.[demo]'\n"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--checkpoint", "3"], "is one snapshot and has no checkpoints: leave --checkpoint out"),
        (["--weights", "live"], "is a snapshot, which has only averaged weights"),
        (["--run", "nowhere"], "nowhere"),
    ],
)
def test_a_run_that_cannot_be_used_is_told(run: Path, capsys, more: list[str], message: str) -> None:
    assert main(["--run", str(run), *more]) == 2
    assert message in capsys.readouterr().err


def test_points_in_the_plane_are_refused(tmp_path: Path, capsys) -> None:
    config = load_config("gaussians25", ["run.directory=unused"])
    run = save_snapshot(tmp_path, build_generator(config).state_dict(), config, step=0)
    assert main(["--run", str(run)]) == 2
    assert capsys.readouterr().err == "this run draws points in the plane, not images\n"
