"""The lock file pins everything that pyproject.toml requires, at allowed versions, and CI uses only these."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.launch import ROOT

PYTHONS = ("3.11", "3.12", "3.13")


def locked() -> dict[str, Version]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(number) for name, number in pins}


def asked_for() -> list[Requirement]:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    names = content["build-system"]["requires"] + project["dependencies"] + project["optional-dependencies"]["dev"]
    return [Requirement(name) for name in names]


def needed(python: str) -> dict[str, list[Requirement]]:
    """All direct and indirect requirements of pyproject.toml, by name, from the installed metadata."""
    found: dict[str, list[Requirement]] = {}
    waiting, done = asked_for(), set[tuple[str, str]]()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        found.setdefault(name, []).append(requirement)
        for extra in {"", *requirement.extras}:
            if (name, extra) in done:
                continue
            done.add((name, extra))
            environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": extra}
            children = map(Requirement, requires(name) or [])
            waiting += [child for child in children if not child.marker or child.marker.evaluate(environment)]
    return found


def test_each_line_pins_one_package_once() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "no options, files, markers, local versions"
    assert len(locked()) == len(lines)


def test_torch_is_pinned_and_torchvision_is_not_there() -> None:
    assert str(locked()["torch"]) == "2.13.0"
    assert "torchvision" not in locked()


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_is_complete_and_allowed(python: str) -> None:
    pins, wrong = locked(), []
    for name, requirements in needed(python).items():
        for requirement in requirements:
            if name not in pins or not requirement.specifier.contains(pins[name], prereleases=True):
                wrong.append(f"{requirement} is asked for, the lock has {pins.get(name, 'nothing')}")
    assert not wrong, "\n".join(wrong)


def test_lock_holds_nothing_that_no_one_asks_for() -> None:
    wanted = set[str]().union(*(needed(python).keys() for python in PYTHONS))
    assert not locked().keys() - wanted - {"setuptools", "wheel"}


def test_these_tests_run_with_the_locked_versions() -> None:
    wrong = {}
    for name, pin in locked().items():
        try:
            found = Version(version(name)).public
        except PackageNotFoundError:
            found = "not installed"
        if found != str(pin):
            wrong[name] = f"{found}, locked is {pin}"
    assert not wrong
