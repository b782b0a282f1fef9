"""An exported folder reaches the Hub whole, or the message says what to do."""

from pathlib import Path

import pytest

from tests.launch import run_python
from tests.trainer.export.hub_server import serving
from tests.trainer.runs import configure
from trainer.checkpoint.snapshot import build_generator, save_snapshot
from trainer.export.command import main

pytestmark = pytest.mark.slow  # each starts a process that imports torch


@pytest.fixture(scope="module")
def snapshot(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("snapshot")
    config = configure(tiny, folder / "run")
    return save_snapshot(folder, build_generator(config).state_dict(), config, 10)


def pushed(snapshot: Path, out: Path, address: str, token: str) -> tuple[int, str, str]:
    """Exit code and output of an export that is pushed to a server."""
    words = ["--run", str(snapshot), "--to", "diffusers", "--out", str(out), "--push", "me/digits"]
    # The client reads its settings when it is imported.
    env = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HOME": str(out.parent / "cache"), "NO_PROXY": "127.0.0.1"}
    done = run_python(["-m", "trainer.export", *words], env=env)
    return done.returncode, done.stdout, done.stderr


def test_a_pushed_folder_is_in_a_new_private_repository_file_by_file(snapshot, tmp_path):
    out = tmp_path / "model"
    with serving("hf_good") as hub:
        assert pushed(snapshot, out, hub.address, "hf_good") == (
            0,
            f"{out}: see README.md in it\nsent to {hub.address}/me/digits\n",
            "",
        )
    assert hub.repositories == {"me/digits": True}
    written = {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert hub.files == written
    assert "generator/diffusion_pytorch_model.safetensors" in written


def test_a_refused_push_keeps_the_folder_and_says_how_to_try_again(snapshot, tmp_path):
    out = tmp_path / "model"
    with serving("hf_good") as hub:
        code, _, errors = pushed(snapshot, out, hub.address, "hf_bad")
    assert code == 2
    assert errors.startswith(f"{out} is written, but not sent to me/digits: ")
    assert errors.endswith(f"To try again: hf upload --private me/digits {out}\n")
    assert "Traceback" not in errors and "hf_bad" not in errors
    assert (out / "model_index.json").exists()
    assert hub.files == {}


def test_a_hub_that_cannot_be_reached_is_named(snapshot, tmp_path):
    with serving("hf_good") as hub:
        address = hub.address
    code, _, errors = pushed(snapshot, tmp_path / "model", address, "hf_good")  # nobody listens there any more
    assert (code, errors.count("\n")) == (2, 1)
    assert "is written, but not sent to me/digits: " in errors


def test_a_wrong_name_and_a_missing_token_or_client_are_refused_before_any_work(
    snapshot, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    words = ["--run", str(snapshot), "--out", str(tmp_path / "new"), "--push"]
    assert main([*words, "digits"]) == 2
    assert "--push is digits, but a repository has the form OWNER/NAME" in capsys.readouterr().err
    assert main([*words, "me/digits"]) == 2
    assert "set HF_TOKEN, or log in with: hf auth login" in capsys.readouterr().err
    monkeypatch.setattr("trainer.export.hub.find_spec", lambda _: None)
    assert main([*words, "me/digits"]) == 2
    assert "--push needs huggingface_hub, which this Python does not have" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
