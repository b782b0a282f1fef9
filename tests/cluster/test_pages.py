"""The launcher's commands on the pages and in the README are accepted as they stand there."""

import re
import shlex
from pathlib import Path

import pytest

from cluster.launch import main
from tests.launch import ROOT

PAGES = ("README.md", "docs/slurm.md", "docs/ray.md", "docs/kubernetes.md")


def commands(page: str) -> list[list[str]]:
    """Words after ./launch.sh of each indented command line that submits, continuation lines joined, comments cut."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in re.findall(r"(?m)^    (\./launch\.sh .+)$", text)]
    found = [shlex.split(line)[1:] for line in lines]
    return [words for words in found if words[0] in ("slurm", "ray", "kubernetes")]


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_page_are_accepted(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = commands(page)
    assert shown
    for words in shown:
        if words[-2:] == ["--set", "..."]:  # the README leaves the paths to the page
            words = [*words[:-2], "--set", "data.path=/shared/data", "--set", "run.directory=/shared/run"]
        elif words[0] == "kubernetes" and "--" not in words:
            words += ["--", "--set", "data.path=/shared/data", "--set", "run.directory=/shared/run"]
        if "--dry-run" not in words:
            words.insert(1, "--dry-run")
        assert main(words) == 0, (page, words, capsys.readouterr())


def test_tables_of_failures_quote_what_is_said():
    """What stands in backticks in the first column of a page's last table comes from the code, word for word."""
    code = "".join(
        file.read_text()
        for folder in ("cluster", "trainer")
        for pattern in ("*.py", "*.sbatch")
        for file in Path(ROOT / folder).rglob(pattern)
    )
    plain = re.sub(r'"\s*\n\s*f?"|\{[^{}]*\}', "", code)
    quoted = {
        "docs/ray.md": ["no token for the cluster", "a relative path"],
        "docs/slurm.md": ["no such interface", "ray start on "],
        "docs/kubernetes.md": ["there is no ", " on this machine"],
    }
    for page, words in quoted.items():
        text = (ROOT / page).read_text()
        assert all(word in plain for word in words) and all(word.strip() in text for word in words), page
