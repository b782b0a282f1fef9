"""The command that uploads: where it sends to, and what it lets out."""

import io
from pathlib import Path
from typing import Any

import pytest

from tests.launch import run_python
from tests.trainer.tracking.helpers.jsonl_sink import JsonLinesSink, read_lines
from tests.trainer.tracking.helpers.opened import opened
from trainer.tracking.command import _hider, _Redacted, _store, main
from trainer.tracking.spool import RunRecords, spool_path
from trainer.tracking.store import TrackingError
from trainer.tracking.tensorboard_sink import read_events
from trainer.tracking.tracker import UploaderProcess


class NoProcess(UploaderProcess):
    def start(self) -> None: ...

    def wait(self, timeout_s: float) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("URI", "USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


def reported(run: Path, uri: str | None, **options: Any) -> None:
    tracker = opened(run, uri, uploader=NoProcess, **options)
    tracker.log_metrics(10, {"loss": 1.0})
    tracker.close("FINISHED")


def target(run: Path) -> str:
    newest = RunRecords(spool_path(run)).newest
    assert newest
    return _store(None, False, newest, run).uri


def test_moved_run_is_sent_to_the_store_next_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, (uri, found) in enumerate(
        {
            None: "sqlite:///{}/mlflow.db",
            "sqlite:///a.db": "sqlite:///{}/a.db",
            "sqlite:////b.db": "sqlite:////b.db",
        }.items()
    ):
        run, there = tmp_path / f"old{number}" / "run", tmp_path / f"new{number}"
        reported(run, uri)
        run.parent.rename(there)
        assert target(there / "run") == found.format(there)


def test_uri_of_the_environment_is_used_where_the_config_named_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported(tmp_path / "a", None)
    reported(tmp_path / "b", "http://config")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert target(tmp_path / "a") == "http://environment"
    assert target(tmp_path / "b") == "http://config"


def test_password_is_taken_from_the_environment_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported(tmp_path, "http://me:pa55w0rd@host")
    with pytest.raises(TrackingError, match="its password is kept in no file"):
        target(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pa55w0rd@host")
    assert target(tmp_path) == "http://me:pa55w0rd@host"


def test_what_is_printed_holds_no_secret_and_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "pa55 w0rd")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:pa55%40w0rd@host")
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1")
    printed = _Redacted(stream, _hider("http://you:0ther@host"))
    print("\N{RUNNER} pa55 w0rd, t0ken, pa55@w0rd, 0ther, http://a:b@host/x", file=printed)
    stream.flush()
    assert raw.getvalue() == b"\\U0001f3c3 ***, ***, ***, ***, http://***@host/x\n"


def test_new_run_is_sent_whole(tmp_path: Path) -> None:
    run, server = tmp_path / "run", tmp_path / "server"
    reported(run, f"file://{server}", backends=("jsonl",))
    for more in ([], ["--new-run"]):
        assert main(["deliver", "--run", str(run), *more], sinks={"jsonl": JsonLinesSink}) == 0
        lines = read_lines(server)
        assert [line["call"] for line in lines if line["call"] != "status"] == [
            *("create", "describe", "artifact", "point"),
            *(["create", "artifact", "point", "describe"] if more else []),
        ]
    assert lines[-1] == {"call": "status", "status": "FINISHED"}


def test_run_is_sent_to_a_tracker_that_it_did_not_name(tmp_path: Path) -> None:
    reported(tmp_path / "run", f"file://{tmp_path}/server", backends=("jsonl",))
    deliver = ["deliver", "--run", str(tmp_path / "run"), "--backend", "tensorboard"]
    assert main(deliver) == 0
    (file,) = (tmp_path / "run/tensorboard").rglob("*tfevents*")
    assert [value.tag for event, _ in read_events(file) for value in event.summary.value][-1] == "loss"
    assert not (tmp_path / "server").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--backend", "tensorbord"],
            "'tensorbord', which this program does not know. It knows mlflow, tensorboard, wandb",
        ),
        (["--uri", "http://host"], "which this run does not report to: add --backend mlflow"),
    ],
)
def test_delivery_to_what_cannot_take_it_is_refused(tmp_path: Path, capsys: Any, more: list[str], words: str) -> None:
    reported(tmp_path / "run", None, backends=("tensorboard",))
    assert main(["deliver", "--run", str(tmp_path / "run"), *more]) == 2
    assert words in capsys.readouterr().err


def test_uploading_starts_without_torch() -> None:
    """It would be most of the process: two seconds and a quarter of a GB for each run."""
    uses = "from trainer.tracking import command, tensorboard_sink; tensorboard_sink._event_class()"
    done = run_python(["-c", f"{uses}; import sys; print('torch' in sys.modules)"])
    assert done.stdout == "False\n", done.stderr
