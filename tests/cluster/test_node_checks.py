"""What a node finds by itself: each check passes on a node that fits, and says what to do on one that does not."""

import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster import node_checks
from cluster.node_checks import CheckError, NodeReport, examine, source_digest
from cluster.preflight import Line, compare_clocks, compare_versions, main, summarize
from tests.launch import ROOT
from trainer.config.io import load_config
from trainer.config.train_config import TrainConfig


@pytest.fixture
def config(tiny, tmp_path) -> TrainConfig:
    directory = tmp_path / "run"
    directory.mkdir()
    return load_config("digits", [*tiny, f"run.directory={directory}"])


def with_path(config: TrainConfig, path: Path) -> TrainConfig:
    return replace(config, data=replace(config.data, path=str(path)))


def test_a_node_that_fits_has_no_problem(config):
    report = examine(config, None, 0)
    assert report.problems == {}
    assert report.facts["shards"].startswith("1 shards, 1797 images, index ")
    assert report.versions["torch"] == torch.__version__.split("+")[0] or report.versions["torch"] == torch.__version__


def test_a_missing_or_cut_shard_is_named(config, tiny_digits, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(tiny_digits, copy)
    (shard,) = copy.glob("*.tar")
    with shard.open("ab") as file:
        file.truncate(100)
    with pytest.raises(CheckError, match=rf"{shard} is missing or has the wrong size: copy the data set again"):
        node_checks.check_shards(with_path(config, copy))
    with pytest.raises(CheckError, match="Mount the folder on this node, or give a URL"):
        node_checks.check_shards(with_path(config, tmp_path / "nowhere"))


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root writes everywhere")
def test_a_run_directory_that_is_not_the_shared_one_is_told(config, tmp_path):
    directory = Path(config.run.directory)
    (directory / "marker").touch()
    assert node_checks.check_run_directory(directory, "marker") == str(directory)
    with pytest.raises(CheckError, match="a local folder of this node, not the one that the driver sees"):
        node_checks.check_run_directory(directory, "another")
    with pytest.raises(CheckError, match=r"cannot be written: No such file or directory. Give a run.directory"):
        node_checks.check_run_directory(tmp_path / "absent", None)


def test_small_shared_memory_is_told(config, monkeypatch):
    large = replace(config, training=replace(config.training, global_batch_size=2**40))
    with pytest.raises(CheckError, match=r"/dev/shm has \d+ MB free, but \d+ MB are needed: .*docker --shm-size"):
        node_checks.check_shared_memory(large)


def test_a_low_limit_of_open_files_is_told():
    pid = os.fork()
    if pid == 0:  # a limit cannot be raised again
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
            node_checks.check_open_files()
        except CheckError as error:
            os._exit(0 if "at most 256 files may be open, but 4096 are needed" in str(error) else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def with_uri(config: TrainConfig, uri: str) -> TrainConfig:
    return replace(config, tracking=replace(config.tracking, backends=("mlflow",), uri=uri))


@pytest.mark.parametrize(
    "uri", ["localhost:5000", "htp://me:pa55w0rd@host", "sqlite://mlflow.db", "http://127.0.0.1:9"]
)
def test_tracking_that_cannot_work_is_a_failed_check(config, uri):
    with pytest.raises(
        CheckError, match=r"^(tracking.uri is |http://127.0.0.1:9 does not answer: .*refused)"
    ) as caught:
        node_checks.check_tracking(with_uri(config, uri))
    assert "pa55w0rd" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_promised_gpus_that_are_not_there_are_told():
    with pytest.raises(CheckError, match=r"8 GPUs are expected, but torch .* finds none: check the driver"):
        node_checks.check_gpus(8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpus_compute_and_one_that_is_in_use_is_told():
    number = torch.cuda.device_count()
    assert node_checks.check_gpus(number).startswith(f"{number} x ")
    with pytest.raises(CheckError, match=rf"{number + 1} GPUs are expected, but {number} found"):
        node_checks.check_gpus(number + 1)
    total = torch.cuda.mem_get_info(0)[1]
    held = torch.empty(int(0.15 * total) + 2**30, dtype=torch.uint8, device="cuda:0")
    with pytest.raises(CheckError, match=r"GPU 0 has \d+ of \d+ MB in use: another program uses it"):
        node_checks.check_gpus(number)
    del held


def test_source_digest_changes_with_any_file(tmp_path):
    for package in node_checks.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = source_digest(tmp_path)
    assert before == source_digest(ROOT)
    with (tmp_path / "trainer/configs/digits.yaml").open("a") as file:
        file.write("# one more line\n")
    assert source_digest(tmp_path) != before


# ---- of several nodes ----


def report(host: str, **versions: str) -> NodeReport:
    return NodeReport(host, {"python": "3.11.7", "torch": "2.13.0"} | versions, {}, {"shards": "1 shards, index a"})


def test_another_version_is_named_with_both_nodes():
    line = compare_versions([report("a"), report("b"), report("c", torch="2.12.0")])
    assert line.passed is False
    assert line.text.startswith("c has torch 2.12.0, a has 2.13.0: use the same")


def test_clocks_may_differ_by_a_second():
    assert compare_clocks({"a": 0.2, "b": -0.9}).passed
    line = compare_clocks({"a": 0.2, "b": -61.04})
    assert (line.passed, line.text) == (
        False,
        "b is -61.0 s off: start time synchronization there (chrony, systemd-timesyncd)",
    )


def test_a_failure_names_its_node_and_other_data_are_told():
    broken = replace(report("b"), problems={"open files": "at most 256"}, facts={"shards": "1 shards, index b"})
    lines = {line.check: line for line in summarize([report("a"), broken])}
    assert lines["open files"] == Line("open files", False, "b: at most 256")
    assert "a has 1 shards, index a; b has 1 shards, index b: copy the same data" in lines["same data"].text


def test_the_command_ends_in_a_table_with_code_2_if_a_line_fails(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sets = [word for text in (*tiny, f"run.directory={tmp_path}/run") for word in ("--set", text)]
    assert main(["--config", "digits", *sets]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        *("versions", "shards", "run directory", "GPUs", "shared memory", "open files", "tracking")
    ]
    uri = ["--set", "tracking.backends=[mlflow]", "--set", "tracking.uri=http://127.0.0.1:9"]
    assert main(["--config", "digits", *sets, *uri]) == 2
    said = capsys.readouterr()
    assert "tracking        FAILED  " in said.out
    assert "preflight: 1 of 7 checks failed; nothing was started" in said.err
    assert main(["--config", "digits", "--set", "run.sead=1"]) == 2
    assert main(["--config", "digits", *sets, *uri, "--set", f"run.directory={tmp_path}/another"]) == 2
    assert not (tmp_path / "another").exists(), "what was not started leaves nothing"
