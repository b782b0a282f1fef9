"""Plan, lease, log and refusals of a config name places without their secrets."""

import logging
from collections.abc import Callable

import pytest

from data.storage import remote
from trainer.checkpoint.lease_places import claim
from trainer.checkpoint.storage import storage_of
from trainer.config.command_line import start_logging
from trainer.config.draft import ConfigError
from trainer.config.io import load_config
from trainer.plan.plan import make_plan, render

SECRET = "hunter2"
PLACES = [f"http://user:{SECRET}/x@127.0.0.1:9/mine", f"s3://bucket/mine?token={SECRET}", f"user:{SECRET}@host/mine"]


@pytest.fixture(autouse=True)
def nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_plan_shows_no_secret() -> None:
    plan = make_plan(load_config("digits", [f"data.path={PLACES[0]}", f"run.directory=https:/user:{SECRET}@host/run"]))
    text = render(plan)
    assert SECRET not in text
    assert "***" in text


@pytest.mark.parametrize("place", PLACES)
def test_lease_and_checkpoints_show_no_secret(place: str, tmp_path) -> None:
    config = load_config("digits", [f"checkpoint.directory={place}", f"run.directory={tmp_path / 'run'}"])
    uses: list[Callable[[], object]] = [lambda: claim(config, "ours"), lambda: storage_of(config).check_writable()]
    shown = []
    for use in uses:
        try:
            use()
        except (OSError, ValueError, RuntimeError) as error:
            shown.append(str(error))
    assert shown
    assert SECRET not in "".join(shown)


@pytest.mark.parametrize(
    "override",
    [
        f"training.micro_batch_size=https://user:{SECRET}@host/" + "x" * 60,
        f"training.micro_batch_size=https://user:{SECRET}{'y' * 60}@host/",
        f"data.pathh=https://user:{SECRET}@host/",
        f"https://user:{SECRET}@host/",
    ],
)
def test_refused_setting_shows_no_secret(override: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("digits", [override])
    assert SECRET not in str(refused.value)
    assert SECRET not in "".join(refused.value.lines)


def test_log_shows_no_secret_of_a_message_or_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    start_logging(0)
    try:
        raise OSError(f"cannot open https://user:{SECRET}@host/mine")
    except OSError:
        logging.getLogger("library").exception("GET https://host/mine?X-Amz-Signature=%s", SECRET)
    written = capsys.readouterr().err
    assert SECRET not in written
    assert "rank 0 ERROR GET https://host/mine?X-Amz-Signature=***" in written
    assert "OSError: cannot open https://***@host/mine" in written
