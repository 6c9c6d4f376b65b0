"""Where the embedded model lies, for whoever reads a model by name."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "embedded"
"""The name that stands for it where a model is named."""


def embedded_model_path() -> Path:
    """Folder of the embedded model, an ordinary checkpoint."""
    return Path(__file__).parent / "demo" / "model"
