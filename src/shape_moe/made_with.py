"""What a result says of how it was made."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package and of others that decide figures.

    Raises:
        PackageNotFoundError: when one is not installed.
    """
    return {name: version(name) for name in ("shape-moe", *packages)}


def made_with(seed: int) -> dict[str, Any]:
    """The seed, the versions and the command, for the documents of verbs that run models."""
    command = " ".join(["shape-moe", *sys.argv[1:]])
    return {"seed": seed, "versions": versions("torch", "transformers"), "command": command}
