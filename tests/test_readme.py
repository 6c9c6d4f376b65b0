"""The README as a package index shows it, and the source distribution that it leads to."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
REPOSITORY = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
PLACES = (
    f"{REPOSITORY}/blob/main/",
    f"{REPOSITORY}/tree/main/",
    f"{REPOSITORY}/raw/main/",
    REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/main/",
)


def targets(text: str) -> list[str]:
    """What links and pictures of a Markdown text lead to, inline or by reference."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"\]\(([^)\s]+)[^)]*\)", text)
    return inline + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> set[str]:
    """Names of the files of the source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as stream:
        return {name.split("/", 1)[1] for name in stream.getnames() if "/" in name}


def test_links_and_pictures_work_anywhere() -> None:
    found = targets(README)
    assert len(found) >= 15
    assert [target for target in found if not target.startswith("https://")] == []
    used = set(re.findall(r"\]\[([^\]]+)\]", README))
    defined = set(re.findall(r"^\[([^\]]+)\]:", README, flags=re.MULTILINE))
    assert used == defined


def test_the_source_distribution_holds_what_the_readme_links(packed) -> None:
    inside = {
        target.removeprefix(place).split("#")[0]
        for target in targets(README)
        for place in PLACES
        if target.startswith(place)
    }
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "docs/quickstart.md", "docs/images/demo_quality.svg"} <= inside
    assert inside - packed == set()


def test_the_source_distribution_can_do_what_the_readme_begins_with(packed) -> None:
    """``make demo`` and ``make test`` need these, and nothing of a work tree's history."""
    assert {"Makefile", "pyproject.toml", "constraints.txt", "tests/conftest.py", "LICENSE"} <= packed
    commands = re.findall(r"^make (\S+)", README, flags=re.MULTILINE)
    assert commands[:2] == ["demo", "test"]
    rules = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(commands) <= set(rules)
