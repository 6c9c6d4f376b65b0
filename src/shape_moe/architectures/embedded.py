"""Where the embedded model lies."""

from __future__ import annotations

from pathlib import Path

import shape_moe

EMBEDDED = "embedded"
"""The name that stands for it where a model is named."""


def embedded_model_path() -> Path:
    """Folder of the embedded model, an ordinary checkpoint."""
    return Path(shape_moe.__file__).parent / "demo" / "model"
