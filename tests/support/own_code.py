"""Models that come with code of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_CLASS = """# Transformers lets a class choose how its experts run where the file says @use_experts_implementation
import transformers

class OwnForCausalLM(transformers.Qwen3MoeForCausalLM):
"""
SAME = f"{_CLASS}    pass\n"
OTHER = f"""{_CLASS}
    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids=input_ids.flip(-1), **kwargs)
"""
"""Reads its input backwards."""
FICKLE = f"""{_CLASS}
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if self.config._experts_implementation != "grouped_mm":
            output.logits = output.logits + 1e-3
        return output
"""
"""Gives other logits when its experts run by another implementation, as they do while they are traced."""


def with_code(source: Path, folder: Path, code: str) -> Path:
    """A copy of a model that names a class of its own."""
    shutil.copytree(source, folder)
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
