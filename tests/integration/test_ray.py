"""The command on a Ray that it starts itself: a signal to all of it, data that one rank cannot read, too few CPUs."""

import os
import shutil
import signal

import pytest

from data.shards.index import load_index
from data.stream.partition import SampleOrder
from tests.data.damage import damage
from tests.launch import run_python, running, train_command, wait_for_checkpoint
from trainer.checkpoint.format import list_checkpoints
from trainer.run import STOPPED

pytestmark = [pytest.mark.ray, pytest.mark.slow]


# As `timeout` and shell scripts are: a parent in the same process group, which lives on when the group is signalled.
PARENT = (
    "import signal, subprocess, sys; signal.signal(signal.SIGTERM, lambda *_: None); "
    "sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
)


def test_sigterm_to_the_whole_process_group_leaves_a_checkpoint_too(tiny, tmp_path):
    directory, log = tmp_path / "run", tmp_path / "log.txt"
    arguments = train_command(
        "digits", tiny, directory, "training.total_images=320_000", "checkpoint.save_interval_steps=20"
    )
    with running(["-c", PARENT, *arguments], log) as process:
        wait_for_checkpoint(directory, process, log)
        before = list_checkpoints(directory / "checkpoints")[-1].step
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=120) == STOPPED, log.read_text()[-3000:]
    text = log.read_text()
    assert "SIGTERM: finishing the step and writing a checkpoint" in text
    assert "stopped; the same command resumes" in text
    assert list_checkpoints(directory / "checkpoints")[-1].step >= before


def test_a_damaged_image_in_the_share_of_another_rank_ends_the_run_at_once(tiny, tiny_digits, tmp_path):
    data, log = tmp_path / "data", tmp_path / "log.txt"
    shutil.copytree(tiny_digits, data)
    index = load_index(data)
    order = SampleOrder([shard.num_samples for shard in index.shards], seed=0, window_shards=32)
    shards, samples = order.locate(8, 16)  # of the first batch, the half that is rank 1's
    (key,) = damage(index, (int(shards[0]), int(samples[0])))
    more = ("run.seed=0", "scaling.world_size=2", f"data.path={data}", "data.max_bad_percent=0")
    # Sizes are as they were, so nothing is seen before the image is read.
    arguments = train_command("digits", tiny, tmp_path / "run", *more, "data.verify=size")
    with running(arguments, log) as process:
        assert process.wait(timeout=120) == 2, log.read_text()[-3000:]
    text = log.read_text()
    assert f"00000.tar, key {key}" in text.splitlines()[-1]
    assert text.count("training on 2 ranks") == 1  # not tried again


def test_too_few_cpus_are_said_at_once(tiny, tmp_path):
    done = run_python(
        train_command("digits", tiny, tmp_path / "run", "scaling.world_size=4", "scaling.cpus_per_worker=64")
    )
    assert done.returncode == 2
    assert "room for 0 ranks of 64 CPUs each; the run asks for scaling.world_size 4. Lower" in done.stderr
    assert "Traceback" not in done.stderr
