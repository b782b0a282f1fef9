"""The image's Dockerfile: pinned packages, no root, no compiler, and everything in it that the manifest starts."""

import re
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
    installs = re.findall(r"pip install ([^&]+)", words)
    assert len(installs) == 3
    for install in installs[:2]:
        assert "--requirement /tmp/tools.txt" in install or "--requirement requirements.lock" in install
    assert "--no-deps --editable ." in installs[2]
    assert not re.search(r"\b(apt|apt-get|curl|wget)\b", words)


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
