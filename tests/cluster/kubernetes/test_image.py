"""The image's Dockerfile: pinned packages, no root, no compiler, and everything in it that the manifest starts."""

import os
import re
import shlex
import shutil
import subprocess
import tomllib

import pytest
import yaml

from tests.launch import ROOT

FOLDER = ROOT / "cluster/kubernetes"


def instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile with their arguments, continued lines joined."""
    lines = (line for line in (FOLDER / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    return found[max(i for i, (word, _) in enumerate(found) if word == "FROM") :]


def test_image_runs_as_the_user_of_the_manifest_and_not_as_root():
    job = next(iter(yaml.safe_load_all((FOLDER / "rayjob.yaml").read_text())))
    pod = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["securityContext"]
    users = [rest for word, rest in last_stage() if word == "USER"]
    assert users == [f"{pod['runAsUser']}:{pod['runAsGroup']}"]
    made = next(rest for word, rest in last_stage() if word == "RUN")
    assert f"--uid {pod['runAsUser']} " in made
    after = [word for word, _ in last_stage()][[word for word, _ in last_stage()].index("USER") :]
    assert "RUN" not in after and "COPY" not in after


def test_nothing_is_installed_but_what_the_lock_pins():
    words = " && ".join(rest for word, rest in instructions() if word == "RUN")
    tools, packages, code = re.findall(r"pip install ([^&]+)", words)
    assert "--requirement /tmp/tools.txt" in tools
    assert "--constraint requirements.lock" in packages and "--no-deps --editable ." in code
    extras = set(re.findall(r"\w+", re.findall(r"\.\[([^]]+)]", packages)[0]))
    assert extras | {"dev"} == set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )
    assert not re.search(r"\b(apt|apt-get|curl|wget)\b", words)


def test_only_what_runs_is_copied_whatever_the_builder_ignores():
    copies = [rest.split()[:-1] for word, rest in instructions() if word == "COPY" and "--from" not in rest]
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for names in copies for name in names} == {line for line in lines if line.startswith("!")}


def test_last_stage_installs_nothing_and_refuses_a_compiler():
    words = " ".join(rest for word, rest in last_stage() if word == "RUN")
    assert "pip" not in words and "! command -v cc gcc g++ clang" in words


@pytest.mark.parametrize(("device", "code"), [("rocm", 2), ("", 2)])
def test_other_devices_are_refused(device, code):
    step = next(rest for word, rest in instructions() if word == "RUN").partition("esac")[0] + "esac"
    done = subprocess.run(["sh", "-c", step], env={"DEVICE": device}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, f"DEVICE is {device}; allowed are cuda and cpu\n")


def test_build_gets_the_packages_and_no_runs_or_data():
    lines = [line for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if not line.startswith("#")]
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert lines[0] == "*"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "requirements.lock", project["project"]["readme"]} <= sent
    assert all((ROOT / name).exists() for name in sent)
    assert not sent & {".git", ".venv", "runs", "datasets", "tests"}


def docker(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)


@pytest.fixture(scope="module")
def image() -> str:
    """The image for CPUs, built; CPU_INDEX in the environment is where torch comes from."""
    if shutil.which("docker") is None:
        pytest.skip("there is no docker on this machine")
    if (asked := docker("version", "--format", "{{.Server.Version}}")).returncode:
        pytest.skip(f"no docker daemon answers: {asked.stderr.strip()}")
    base = next(rest for word, rest in instructions() if word == "FROM").split()[0].replace("${PYTHON}", "3.11")
    if docker("image", "inspect", base).returncode and (pulled := docker("pull", base, timeout_s=600)).returncode:
        pytest.skip(f"docker cannot pull {base}: {pulled.stderr.strip()}")
    index = [f"--build-arg=CPU_INDEX={os.environ['CPU_INDEX']}"] if "CPU_INDEX" in os.environ else []
    command = ["build", "--network", "host", "--file", str(FOLDER / "Dockerfile"), "--tag", "ddgan:test-cpu", *index]
    built = docker(*command, "--build-arg", "DEVICE=cpu", "--build-arg", "COMMIT=tested", ".", timeout_s=3600)
    assert built.returncode == 0, (built.stdout + built.stderr)[-5000:]
    return "ddgan:test-cpu"


@pytest.mark.slow
def test_image_trains_as_a_user_without_rights_and_holds_only_what_runs(image):
    settings = ["run.directory=/tmp/run", "data.path=/tmp/digits", "training.total_images=64", "tracking.backends=[]"]
    training = shlex.join(["--config", "digits", *(word for setting in settings for word in ("--set", setting))])
    script = f"""set -e
        id --user; echo $DDGAN_GIT_COMMIT; ls -A
        if command -v cc gcc g++ clang || python -c 'import pytest' 2>&-; then exit 9; fi
        python -m data.prepare digits --size 16 --out /tmp/digits
        python -m trainer.run {training} --dry-run
        python -m cluster.launch train {training}
        ls /tmp/run/snapshots
    """
    done = docker("run", "--rm", "--network", "none", "--shm-size", "1g", image, "bash", "-c", script, timeout_s=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    lines = done.stdout.splitlines()
    assert lines[:2] == ["1000", "tested"]
    folders = {"cluster", "data", "models", "trainer", "ddgan.egg-info"}
    files = {"LICENSE", "README.md", "launch.sh", "pyproject.toml", "requirements.lock"}
    assert folders | files == set(lines[2 : 2 + len(folders | files)])
    assert lines[-1] == "step-00000002"
