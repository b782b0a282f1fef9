import logging
import threading
import time
from collections.abc import Callable

import pytest

from data.storage.errors import UserError
from tests.trainer.driver.hooked import hooked
from trainer.config.io import load_config, shown_config, to_dict
from trainer.config.train_config import TrainConfig
from trainer.driver.notifier import Notifier
from trainer.driver.ray_train import RunDivergedError, RunFailedError
from trainer.rank.progress import Outcome
from trainer.run import main
from trainer.timing.event_log import events_file, read_events


def test_events_come_in_their_order_with_what_is_known_of_them():
    with hooked() as hook:
        notifier = Notifier(hook.address, "runs/mine")
        notifier.tell("started")
        notifier.tell("finished", step=10, images=160)
        notifier.close()
        assert hook.events == ["started", "finished"]
        last = hook.got[1]
        assert (last["run"], last["step"], last["images"]) == ("mine", 10, 160)
        assert last["text"] == "mine finished: step 10, images 160"


def test_an_address_that_fails_at_first_gets_each_event_once():
    with hooked(answers=[500, 503]) as hook:
        notifier = Notifier(hook.address, "runs/mine")
        notifier.tell("started")
        notifier.tell("stopped")
        notifier.close()
        assert hook.events == ["started", "stopped"]


def test_nothing_waits_for_an_address_that_hangs(caplog):
    before = set(threading.enumerate())
    with hooked(hangs=True) as hook:
        notifier = Notifier(hook.address, "runs/mine", close_s=0.5)
        begun = time.monotonic()
        for _ in range(1000):
            notifier.tell("restarted", reason="a rank is gone")
        told = time.monotonic()
        notifier.close()
        assert told - begun < 0.4  # a request alone would wait for 5 s
        assert 0.4 < time.monotonic() - told < 4
    (line,) = caplog.messages
    assert "/*** does not answer" in line
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) <= before  # not one is left that sends the rest
    assert len(hook.events) <= 1 and caplog.messages == [line]


def test_an_address_that_is_gone_is_named_without_its_secret(caplog, monkeypatch):
    monkeypatch.setattr("trainer.driver.notifier.ATTEMPTS", 1)
    with hooked() as hook:
        address = hook.address
    with caplog.at_level(logging.WARNING):
        notifier = Notifier(address, "runs/mine")
        notifier.tell("started")
        notifier.close()
    (line,) = caplog.messages
    assert "/*** was not told that the run started: " in line
    assert "secret" not in line


def test_without_an_address_nothing_is_sent():
    before = set(threading.enumerate())
    notifier = Notifier(None, "runs/mine")
    notifier.tell("started")
    assert set(threading.enumerate()) <= before
    notifier.close()


def test_secrets_in_a_reason_are_not_sent():
    with hooked() as hook:
        notifier = Notifier(hook.address, "runs/mine")
        notifier.tell("restarted", reason="cannot read s3://key:word@bucket/shards")
        notifier.close()
    (content,) = hook.got
    assert "word" not in str(content)
    assert "bucket/shards" in content["reason"]


def test_the_address_is_in_no_file_of_a_run():
    config = load_config("digits", ["tracking.notify=https://user:word@hooks.example.org/services/secret"])
    assert config.tracking.notify == "https://user:word@hooks.example.org/services/secret"
    assert to_dict(config)["tracking"]["notify"] is None
    assert "notify: null" in shown_config(config)


@pytest.mark.parametrize(
    ("end", "told", "code"),
    [
        (Outcome(finished=True, step=2, images=32, samples=None, checkpoint="c", snapshot="s"), "finished", 0),
        (Outcome(finished=False, step=1, images=16, samples=None, checkpoint="c", snapshot=None), "stopped", 75),
        (RunDivergedError("20 updates in a row were skipped"), "diverged", 1),
        (RunFailedError("the workers failed 3 times"), "failed", 1),
        (UserError("data.path is gone"), "failed", 2),
        (KeyboardInterrupt(), "stopped", 130),
        (SystemExit(1), "stopped", 75),
    ],
)
def test_what_becomes_of_a_run_is_told_and_kept(tiny, tmp_path, monkeypatch, end, told, code):
    def fit(_: TrainConfig, restarted: Callable[[str], None], __: Callable[[str], None]) -> Outcome:
        restarted("a node was lost")
        if isinstance(end, BaseException):
            raise end
        return end

    monkeypatch.setattr("trainer.run.set_up_ray", lambda: None)
    monkeypatch.setattr("trainer.driver.ray_train.fit", fit)
    with hooked() as hook:
        sets = (*tiny, f"run.directory={tmp_path}/run", f"tracking.notify={hook.address}")
        assert main(["--config", "digits", *(word for text in sets for word in ("--set", text))]) == code
    assert hook.events == ["started", "restarted", told]
    kept = [event.kind for event in read_events(events_file(tmp_path / "run", "driver"))]
    assert [kind for kind in kept if kind in hook.events] == hook.events
