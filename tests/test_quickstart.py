"""The quickstart as it is printed: every shell and Python block, one after the other, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "quickstart.md").read_text(encoding="utf-8")


@pytest.mark.timeout(1800)
def test_the_quickstart_works_as_printed(tmp_path) -> None:
    """Blocks of language ``text`` are for models that are not here; all others are run."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, words in (("python3", [sys.executable]), ("shape-moe", [sys.executable, "-m", "shape_moe"])):
        (commands / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (commands / name).chmod(0o755)
    found = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert [language for language, _ in found].count("python") == 2
    script = "\n".join(
        block if language == "bash" else f"python3 - <<'END OF BLOCK'\n{block}END OF BLOCK" for language, block in found
    )
    env = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(["bash", "-e", "-c", script], cwd=home, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Verdict: " in done.stdout
    assert "PASS" in done.stdout
    assert "sort 31415926=11234569" in done.stdout
    made = home / "try"
    assert {"smaller", "by-hand", "from-python", "traces"} <= {path.name for path in made.iterdir() if path.is_dir()}
    assert "<html" in (made / "report.html").read_text(encoding="utf-8")[:2000]
    models = json.loads((made / "evaluation.json").read_text())["models"]
    assert [model["kind"] for model in models] == ["dense", "checkpoint"]
    selections = [json.loads((made / name / "shape" / "selection.json").read_text()) for name in ("smaller", "by-hand")]
    assert [sum(map(len, chosen["layers"].values())) for chosen in selections] == [77, 77]
