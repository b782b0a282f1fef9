"""Jobs on a real Slurm of two nodes: they run to the end, are preempted, meet their time limit, are cancelled, fail."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch import ROOT, run_ranks, slow_steps
from tests.slurm import Slurm, slurm, which
from trainer.checkpoint.fingerprint import fingerprint
from trainer.checkpoint.format import list_checkpoints
from trainer.config.io import load_config

pytestmark = [pytest.mark.slurm, pytest.mark.ray, pytest.mark.slow]

STEPS = 300  # of 0.4 s and more: Slurm looks at time limits every 30 seconds, and the run must not be done by then
LONG = (f"training.total_images={16 * STEPS}", "checkpoint.save_interval_steps=20", "checkpoint.keep_last=1000")
START_S, END_S, GRACE_S = 240, 600, 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Slurm]:
    # 4 CPUs a node, so that there is room for two jobs at once.
    with slurm(tmp_path_factory.mktemp("slurm"), cpus=4) as found:
        yield found


class Jobs:
    """Submits the digits at 8 px, two nodes of one CPU, and knows where each job writes."""

    def __init__(self, cluster: Slurm, folder: Path, overrides: tuple[str, ...]) -> None:
        self.cluster, self.folder, self.overrides = cluster, folder, overrides

    def submit(self, name: str, *sets: str, options: tuple[str, ...] = ()) -> str:
        words = [
            word for text in (*self.overrides, f"run.directory={self.folder / name}", *sets) for word in ("--set", text)
        ]
        command = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", f"--output={self.folder}/%j.log", *options]
        command += [f"--chdir={ROOT}", "cluster/slurm/job.sbatch", "--config", "digits", *words]
        return self.run(*command)

    def run(self, *command: str) -> str:
        """Its output."""
        settings = {
            "DDGAN_INTERFACE": "lo",
            "DDGAN_TMPDIR": str(self.scratch),
            "DDGAN_LAUNCHES": f"{self.folder}/launches",
            **slow_steps(0.4),
        }
        env = os.environ | self.cluster.env | settings
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    def log(self, job: str) -> str:
        file = self.folder / f"{job}.log"
        return file.read_text() if file.exists() else ""

    def wait_for_steps(self, name: str, job: str, *, after: int = 0) -> int:
        """Until the run has a checkpoint beyond `after`; its step."""
        deadline = time.monotonic() + START_S
        while True:
            steps = [checkpoint.step for checkpoint in list_checkpoints(self.folder / name / "checkpoints")]
            if steps and steps[-1] > after:
                return steps[-1]
            assert self.cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), self.log(job)
            assert time.monotonic() < deadline, self.log(job)
            time.sleep(0.3)

    def wait_for_requeue(self, job: str, times: int) -> None:
        """Until the job waits to be started again, and let it start at once instead of after Slurm's two minutes."""
        self.cluster.wait_for(job, lambda seen: seen["Restarts"] == str(times), timeout_s=120)
        self.cluster.wait_for(job, lambda seen: seen["JobState"] == "PENDING", timeout_s=120)
        # Slurm would take the end of the old script for that of the new one. Its two minutes are there for that.
        deadline = time.monotonic() + 30
        while any(of_job(process, job) for process in psutil.process_iter()):
            assert time.monotonic() < deadline
            time.sleep(0.3)
        time.sleep(3)
        self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.fixture
def jobs(cluster, tiny, tmp_path) -> Iterator[Jobs]:
    found = Jobs(cluster, tmp_path, tiny)
    found.scratch.mkdir()
    yield found
    cluster.cancel_all()  # those of a test that failed


def of_job(process: psutil.Process, job: str) -> bool:
    """Whether Slurm has started it for that job."""
    try:
        return process.environ().get("SLURM_JOB_ID") == job
    except psutil.Error:
        return False


def left_over(jobs: Jobs) -> list[str]:
    """Processes and files of jobs that have ended."""
    names = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(jobs.scratch) in line or ("cluster.slurm.node" in line and str(jobs.folder) in line):
            names.append(line[:200])
    folders = [str(path) for path in jobs.scratch.iterdir()]
    return names + folders


def assert_nothing_left(jobs: Jobs) -> None:
    deadline = time.monotonic() + 30
    while left := left_over(jobs):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


@pytest.mark.timeout(1500)
def test_a_job_that_is_preempted_and_meets_its_time_limit_ends_as_an_undisturbed_run(cluster, jobs):
    preempted = jobs.submit("preempted", *LONG, options=("--time=60",))
    cluster.wait_for(preempted, lambda seen: seen["JobState"] == "RUNNING", timeout_s=60)
    assert cluster.job(preempted)["NodeList"] == "n[1-2]"
    assert_only_its_owner_reads_the_tokens((preempted,))

    # A job of the high partition wants all processors.
    jobs.wait_for_steps("preempted", preempted)
    asked = time.time()
    wanted = ("--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--output=/dev/null")
    urgent = jobs.run("sbatch", "--parsable", *wanted, "--wrap", "true")
    jobs.wait_for_requeue(preempted, 1)
    saved = list_checkpoints(jobs.folder / "preempted" / "checkpoints")[-1]
    assert (saved.path / "manifest.json").stat().st_mtime - asked < GRACE_S
    first_stop = saved.step
    assert f"asked to stop: step {first_stop} is done" in jobs.log(preempted)
    assert 20 <= first_stop < STEPS
    assert cluster.wait_for_end(urgent, timeout_s=60)["JobState"] == "COMPLETED"

    # The time limit comes near: Slurm warns 180 s before it, and up to 60 earlier.
    jobs.wait_for_steps("preempted", preempted, after=first_stop)
    minutes = int(cluster.job(preempted)["RunTime"].split(":")[1]) + 3
    cluster.run("scontrol", "update", f"JobId={preempted}", f"TimeLimit={minutes}")
    jobs.wait_for_requeue(preempted, 2)
    second_stop = list_checkpoints(jobs.folder / "preempted" / "checkpoints")[-1].step
    assert first_stop < second_stop < STEPS
    cluster.run("scontrol", "update", f"JobId={preempted}", "TimeLimit=60")

    seen = cluster.wait_for_end(preempted, timeout_s=START_S + END_S)
    assert (seen["JobState"], seen["ExitCode"], seen["Restarts"]) == ("COMPLETED", "0:0", "2"), jobs.log(preempted)
    text = jobs.log(preempted)
    assert "requeued: it resumes from its last checkpoint (restart 2 of at most 20)" in text
    assert f"resuming from {jobs.folder}/preempted/checkpoints/step-{second_stop:08d}" in text
    sets = (*jobs.overrides, *LONG, f"run.directory={jobs.folder}/undisturbed", "scaling.world_size=2")
    sets += ("scaling.device=cpu",)
    done = run_ranks(2, ["-m", "trainer.worker", "--config", "digits", *(x for o in sets for x in ("--set", o))])
    assert done.returncode == 0, done.stderr[-3000:]
    straight, broken = (
        list_checkpoints(jobs.folder / name / "checkpoints")[-1] for name in ("undisturbed", "preempted")
    )
    assert straight.step == broken.step == STEPS
    assert fingerprint(straight).differing(fingerprint(broken)) == []
    assert_nothing_left(jobs)
    assert not [name for name in os.listdir(ROOT / "runs/slurm") if name == preempted]


@pytest.mark.timeout(900)
def test_of_an_array_one_seed_is_cancelled_and_the_other_stopped_by_the_launcher(cluster, jobs):
    sets = (*jobs.overrides, *LONG, f"run.directory={jobs.folder}/seeds", "training.total_images=1600000")
    words = [word for text in sets for word in ("--set", text)]
    launch = [sys.executable, "-m", "cluster.launch"]
    jobs.run(
        *launch, "slurm", "--config", "digits", "--nodes", "1", "--seeds", "1-2", "--interface", "lo", "--", *words
    )
    status = jobs.run(*launch, "status", f"{jobs.folder}/seeds")
    assert set(status.split()) & {"RUNNING", "PENDING"}
    array = status.split("slurm job ")[1].split(",")[0]
    for seed in (1, 2):
        jobs.wait_for_steps(f"seeds/seed-{seed}", f"{array}_{seed}")
        assert load_config(f"{jobs.folder}/seeds/seed-{seed}/config.yaml").run.seed == seed
    cluster.run("scancel", f"{array}_1")
    seen = cluster.wait_for_end(f"{array}_1", timeout_s=90)
    assert (seen["JobState"], seen["Restarts"]) == ("CANCELLED", "0")
    before = jobs.wait_for_steps("seeds/seed-2", f"{array}_2")
    time.sleep(3)  # the other one is left alone by that
    jobs.run(*launch, "stop", f"{jobs.folder}/seeds")
    seen = cluster.wait_for_end(f"{array}_2", timeout_s=90)
    assert (seen["JobState"], seen["ExitCode"], seen["Restarts"]) == ("FAILED", "130:0", "0")
    logs = jobs.run(*launch, "logs", f"{jobs.folder}/seeds")
    assert "stopped; the same command resumes" in logs and "requeued: it resumes" not in logs
    for seed in (1, 2):
        newest = list_checkpoints(jobs.folder / f"seeds/seed-{seed}" / "checkpoints")[-1]
        newest.verify()
        assert seed == 1 or newest.step > before
    assert_nothing_left(jobs)


def assert_only_its_owner_reads_the_tokens(numbers: tuple[str, ...]) -> None:
    deadline = time.monotonic() + 60
    tokens = set()
    for number in numbers:
        file = ROOT / "runs/slurm" / number / "token"
        while not (file.exists() and file.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        tokens.add(token := file.read_text())
        assert re.fullmatch("[0-9a-f]{64}", token)
        lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert token not in lines
    assert len(tokens) == len(numbers)


def test_a_wrong_config_fails_within_a_minute_with_its_message_in_the_output(cluster, jobs):
    asked = time.monotonic()
    job = jobs.submit("wrong", "training.r1_gama=1")
    seen = cluster.wait_for_end(job, timeout_s=60)
    assert time.monotonic() - asked < 60
    assert (seen["JobState"], seen["ExitCode"]) == ("FAILED", "2:0")
    assert "training.r1_gama" in jobs.log(job) and "did you mean" in jobs.log(job)
    assert "Traceback" not in jobs.log(job)
    assert_nothing_left(jobs)


@pytest.mark.parametrize("code", [75, 143])
def test_a_job_that_may_not_be_requeued_any_more_says_so(cluster, jobs, code):
    """A task that ends as a stopped run does, or one that was stopped at its very start, stands in for it."""
    stand_in = jobs.folder / "bin" / "python"
    stand_in.parent.mkdir()
    stand_in.write_text(f"#!/bin/sh\nexit {code}\n")
    stand_in.chmod(0o755)
    venv = f"ALL,DDGAN_VENV={jobs.folder},DDGAN_MAX_REQUEUES=0"
    job = jobs.submit("again", options=(f"--export={venv}",))
    seen = cluster.wait_for_end(job, timeout_s=60)
    assert (seen["JobState"], seen["ExitCode"], seen["Restarts"]) == ("FAILED", f"{code}:0", "0")
    assert "not requeued: it has been restarted 0 times (DDGAN_MAX_REQUEUES)" in jobs.log(job)


BUSY = """#!/bin/sh
[ -e {folder}/asked-$2 ] || {{ touch {folder}/asked-$2; echo "Unable to contact slurm controller" >&2; exit 1; }}
exec {scontrol} "$@"
"""
"""Answers each kind of question the second time."""


def test_the_last_task_of_an_array_requeues_itself_alone_though_the_controller_is_busy(cluster, jobs):
    """The last task has the number of the whole array."""
    stand_ins = jobs.folder / "bin"
    stand_ins.mkdir()
    (stand_ins / "python").write_text("#!/bin/sh\n[ $SLURM_ARRAY_TASK_ID = 2 ] && exit 75\nsleep 600\n")
    (stand_ins / "scontrol").write_text(BUSY.format(folder=jobs.folder, scontrol=which("scontrol")))
    for name in ("python", "scontrol"):
        (stand_ins / name).chmod(0o755)
    exported = f"ALL,DDGAN_VENV={jobs.folder},PATH={stand_ins}:{os.environ['PATH']}"
    options = ("--array=1-2", "--nodes=1", f"--export={exported}", f"--output={jobs.folder}/%A_%a.log")
    array = jobs.submit("array", options=options)
    cluster.wait_for(f"{array}_2", lambda seen: seen["Restarts"] == "1", timeout_s=60)
    other = cluster.job(f"{array}_1")
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")
    assert "Unable to contact" in jobs.log(f"{array}_2")
