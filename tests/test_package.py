"""The package as ``import shape_moe`` shows it."""

from __future__ import annotations

import subprocess
import sys

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
