"""The package as ``import shape_moe`` shows it."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

import shape_moe

OPTIONS = [name for name in shape_moe.__all__ if name.endswith(("Options", "Job"))]


def test_every_public_name_is_there() -> None:
    assert [name for name in shape_moe.__all__ if not hasattr(shape_moe, name)] == []


def test_options_and_verbs_are_light() -> None:
    """What can be asked, and the defaults that help names, need neither torch nor transformers."""
    verbs = ["evaluate", "experiment", "inspect_model", "prune", "select", "sweep", "trace"]
    code = (
        f"import sys, shape_moe; [getattr(shape_moe, name) for name in {OPTIONS + verbs}]; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_container_installs_what_is_there_and_runs_the_command() -> None:
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    steps = [line.split(maxsplit=1) for line in (root / "Containerfile").read_text().splitlines()]
    said = {step[0]: step[1] for step in steps if len(step) == 2}
    copied = [part for step, rest in (s for s in steps if len(s) == 2) if step == "COPY" for part in rest.split()[:-1]]
    assert {"pyproject.toml", "src", project["readme"], *project["license-files"], "constraints.txt"} == set(copied)
    assert all((root / name).exists() for name in copied)
    assert json.loads(said["ENTRYPOINT"]) == list(project["scripts"])
    version = said["FROM"].removeprefix("python:").removesuffix("-slim")
    assert Version(version) in SpecifierSet(project["requires-python"])
