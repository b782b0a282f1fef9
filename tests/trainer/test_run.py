"""The command refuses invalid input before Ray is imported, and shows what a run would cost."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import run_python
from tests.trainer.runs import Stopper, configure, train
from trainer.checkpoint.lease import Holder, this_process
from trainer.checkpoint.lease_places import FolderLease
from trainer.config.draft import ConfigError
from trainer.config.io import load_config, with_absolute_paths
from trainer.run import main
from trainer.tracking.store import LIBRARIES


def arguments(tiny, directory: Path, *more: str) -> list[str]:
    overrides = [*tiny, f"run.directory={directory}", *more]
    return ["--config", "digits", *(x for o in overrides for x in ("--set", o))]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Every test here must end before Ray is started."""

    def reached() -> None:
        raise AssertionError("did not end before the start of Ray")

    monkeypatch.setattr("trainer.run.set_up_ray", reached)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "training.r1_gama=1"], "did you mean"),
        (["--set", "data.path=/nowhere"], "python -m data.prepare"),
        (["--set", "data.image_size=16", "--set", "generator.attention_resolutions=[8]"], "was prepared with 8"),
        (["--init-from", "/nowhere.pth"], "run.init_from is /nowhere.pth: there is no such file or folder"),
        (["--init-from", "{run}"], "the directory of this very run: set another run.directory"),
        (["--init-from", "/"], "run.init_from is /, which is the folder of no run, snapshot or exported model"),
        (
            ["--set", "discriminator.init_from=generator"],
            "the generator starts with random weights: give run.init_from",
        ),
        (["--set", "scaling.world_size=5"], "16 / discriminator.stddev_group_size 4 makes 4"),
        (["--config", "digit"], "digits"),
        (["--dry-run", "--gpu", "v100"], "only for h100, h200, a100, l40s, rtx4090: choose one of these"),
        (["--gpu", "h100"], "add --dry-run, or leave --gpu out"),
        (["--dry-run", "--usd-per-gpu-hour", "2"], "add --gpu with one of h100, h200"),
    ],
)
def test_a_mistake_is_named_with_code_2(tiny, tmp_path, capsys, more, message):
    words = [word.format(run=tmp_path / "run") for word in more]
    assert main([*arguments(tiny, tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dry_run_prints_config_and_plan_and_touches_nothing(tmp_path, capsys):
    assert main(["--config", "lsun256", "--dry-run", "--set", f"run.directory={tmp_path}/run"]) == 0
    out = capsys.readouterr().out
    assert "global_batch_size: 64" in out
    assert "39.73 M" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_dry_run_with_a_gpu_predicts_time_and_price(capsys):
    arguments = ["--config", "gaussians25", "--dry-run", "--gpu", "H200", "--usd-per-gpu-hour", "2.50"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "prediction for 1 x NVIDIA H200 SXM 141GB in bf16, with fused operators; nothing of it was measured" in out
    assert "USD, at 2.50 a GPU-hour" in out


@pytest.mark.parametrize("price", ["-1", "nan", "free", "1e9"])
def test_what_is_no_price_is_refused(price, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--config", "digits", "--dry-run", "--gpu", "h100", f"--usd-per-gpu-hour={price}"])
    assert ended.value.code == 2
    assert f"{price} is not a price" in capsys.readouterr().err


def test_shards_that_are_missing_are_named_before_the_start(tiny, tiny_digits, tmp_path, capsys):
    broken = tmp_path / "data"
    broken.mkdir()
    (broken / "index.json").write_bytes((tiny_digits / "index.json").read_bytes())
    assert main([*arguments(tiny, tmp_path / "run"), "--set", f"data.path={broken}"]) == 2
    assert "00000.tar" in capsys.readouterr().err


def test_relative_paths_are_made_absolute_outside_a_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(load_config("digits"), inside_job=False)
    assert config.run.directory == str(tmp_path / "runs/digits")
    assert config.data.path == str(tmp_path / "datasets/digits")


@pytest.mark.slow
def test_dry_run_shows_no_password(tiny, tmp_path, capsys):
    url = "data.path=ftp-of-mine://user:pa55w0rd@host/set"
    assert main([*arguments(tiny, tmp_path / "run"), "--set", url, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "ftp-of-mine://***@host/set" in shown
    assert "pa55w0rd" not in shown


@pytest.mark.parametrize("inside_job", [False, True])
@pytest.mark.parametrize("url", ["s3://bucket/mine", "https://host/mine", "file:///shared/mine"])
def test_urls_of_data_stay_as_they_are(inside_job, url):
    places = [f"data.path={url}", "run.directory=/shared/runs/x", "data.cache_directory=/scratch"]
    config = load_config("digits", places)
    assert with_absolute_paths(config, inside_job=inside_job) == config


def test_checkpoints_elsewhere_have_an_absolute_path_or_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, found in (("saved", str(tmp_path / "saved")), ("s3://bucket/x", "s3://bucket/x"), ("null", None)):
        config = load_config("digits", [f"checkpoint.directory={given}"])
        assert with_absolute_paths(config, inside_job=False).checkpoint.directory == found


def test_files_of_the_evaluation_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("digits", ["evaluation.network=net.pt", "evaluation.reference=s3://bucket/real"])
    evaluation = with_absolute_paths(config, inside_job=False).evaluation
    assert (evaluation.network, evaluation.reference) == (str(tmp_path / "net.pt"), "s3://bucket/real")


def test_directory_of_a_run_that_is_going_on_is_refused(tiny, tmp_path, capsys):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        identity = f"{this_process().split()[0]} {process.pid} {fields[19]}"
        tmp_path.joinpath("run").mkdir()
        holder = Holder("other", identity, "t", "node7", process.pid, "2026-11-24T05:00:00Z")
        assert FolderLease(tmp_path / "run").swap(None, holder.encode())
        assert main(arguments(tiny, tmp_path / "run")) == 2
        told = f"{tmp_path}/run is in use by another run: process {process.pid} on node7, since 2026-11-24T05:00:00Z"
        assert told in capsys.readouterr().err
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("pipe:touch x", "checkpoint.directory: pipe:touch x: pipe: is no storage"),
        ("{tmp}/file/x", "checkpoint.directory is {tmp}/file/x, which cannot be written"),
    ],
)
def test_place_for_checkpoints_that_cannot_be_used_is_named(tiny, tmp_path, capsys, place, told):
    (tmp_path / "file").write_text("")
    more = f"checkpoint.directory={place.format(tmp=tmp_path)}"
    assert main(arguments(tiny, tmp_path / "run", more)) == 2
    assert told.format(tmp=tmp_path) in capsys.readouterr().err


def test_tracking_uri_that_cannot_work_is_one_line_at_the_start(tiny, tmp_path, capsys):
    more = ("tracking.backends=[mlflow]", "tracking.uri=localhost:5000")
    assert main(arguments(tiny, tmp_path / "run", *more)) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "rank 0" not in text]
    assert line.startswith("tracking.uri is localhost:5000: did you mean http://localhost:5000?")
    assert not (tmp_path / "run").exists()


def test_tracker_without_its_library_is_one_line_at_the_start(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(LIBRARIES, "wandb", "wandb_of_nowhere")
    assert main(arguments(tiny, tmp_path / "run", "tracking.backends=[tensorboard, wandb]")) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "rank 0" not in text]
    assert line.startswith("the tracker wandb needs the Python package wandb_of_nowhere, which is not installed")
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_would_be_left_behind_are_named(tiny, tmp_path, capsys):
    train(configure(tiny, tmp_path / "run"), Stopper(2))
    assert main(arguments(tiny, tmp_path / "run", f"checkpoint.directory={tmp_path}/elsewhere")) == 2
    told = capsys.readouterr().err
    assert f"checkpoint.directory is {tmp_path}/elsewhere, which holds no checkpoint, but the run in" in told
    assert f"has kept its own in {tmp_path}/run/checkpoints, the newest of step 2. Copy them, set" in told


def test_relative_paths_are_refused_inside_a_job_with_the_reason():
    with pytest.raises(ConfigError) as refused:
        with_absolute_paths(load_config("digits"), inside_job=True)
    assert len(refused.value.lines) == 2
    assert "run.directory is runs/digits, a relative path: inside a Ray job each process has a temporary" in str(
        refused.value
    )


def test_a_used_directory_is_refused_with_resume_never(tiny, tmp_path, capsys):
    train(configure(tiny, tmp_path, "training.total_images=32"), Stopper(1))
    assert main([*arguments(tiny, tmp_path), "--resume", "never"]) == 2
    assert f"{tmp_path} already holds a run" in capsys.readouterr().err


def test_resuming_with_a_changed_config_names_what_may_change(tiny, tmp_path, capsys):
    train(configure(tiny, tmp_path), Stopper(1))
    assert main(arguments(tiny, tmp_path, "training.r1_gamma=9")) == 2
    err = capsys.readouterr().err
    assert "training.r1_gamma" in err
    assert "May change:" in err


def test_a_finished_run_is_summed_up_without_starting_ray(tiny, tmp_path, capsys):
    train(configure(tiny, tmp_path, "training.total_images=32"))
    assert main(arguments(tiny, tmp_path, "training.total_images=32")) == 0
    out = capsys.readouterr().out
    assert "finished: step 2, 32 images" in out
    assert f"samples      {tmp_path}/samples/step-00000002.png" in out


def test_a_run_directory_that_is_a_file_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    assert main(arguments(tiny, tmp_path / "run")) == 2
    assert "which is a file; give a folder" in capsys.readouterr().err


def test_a_run_directory_that_cannot_be_made_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(arguments(tiny, tmp_path / "file" / "run")) == 2
    assert "which cannot be written: Not a directory" in capsys.readouterr().err


def test_weights_to_start_from_are_not_needed_to_resume(tiny, tmp_path):
    train(configure(tiny, tmp_path, "training.total_images=32"))
    assert main([*arguments(tiny, tmp_path, "training.total_images=32"), "--init-from", "/gone.pth"]) == 0


@pytest.mark.slow
def test_help_explains_the_command():
    done = run_python(["-m", "trainer.run", "--help"])
    assert done.returncode == 0
    for word in ("--config", "--set", "--resume", "--dry-run", "--init-from"):
        assert word in done.stdout


def test_dry_run_says_what_is_chosen_for_a_gpu(tiny, tmp_path, capsys):
    data = next(words for words in tiny if words.startswith("data.path="))
    command = ["--config", "digits", "--gpus", "1", "--gpu-memory", "24", "--set", data, "--set", "data.image_size=8"]
    assert main([*command, "--set", f"run.directory={tmp_path / 'run'}", "--dry-run"]) == 0
    words = capsys.readouterr().out
    assert words.startswith("settings for 1 GPU of 24 GB\n  scaling.world_size=1; the global batch stays 32\n")
    assert "world_size: 1" in words and "micro_batch_size: 32" in words and "precision: bf16" in words
