"""What a pruned checkpoint carries besides weights: its code, and the root files that loaders and servers need."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from shape_moe.architectures.model_folder import QUANTISATION_FILES
from shape_moe.architectures.snapshot import ROOT_FILES, Snapshot
from shape_moe.json_file import read_json
from shape_moe.pruning.model_config import CODE_MODULE
from shape_moe.pruning.quantisation import (
    QUANTISATION_KEY,
    Numbering,
    check_quantisation,
    renumber_quantisation,
)


def copy_root_files(source: Path, folder: Path) -> list[str]:
    """Copy the original's tokenizer, generation settings, chat template and licence; subfolders are not entered."""
    names = sorted(f.name for f in source.iterdir() if f.is_file() and any(fnmatch(f.name, p) for p in ROOT_FILES))
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def copy_code(folder: Path) -> None:
    """Put the Python file into the checkpoint that ``trust_remote_code=True`` loads."""
    code = f"{CODE_MODULE}.py"  # found beside this file: importing it would load torch
    shutil.copyfile(Path(__file__).with_name(code), folder / code)


def write_quantisation_files(source: Path, folder: Path, numbering: Numbering) -> list[str]:
    """Write the files beside ``config.json`` that hold quantisation settings, with the experts' new numbers.

    Returns:
        The names of the files.

    Raises:
        UnsupportedModelError: naming a pattern that tells experts apart.
    """
    written = []
    for name, settings in quantisation_files(source).items():
        content = renumber_quantisation(settings, numbering, name)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        written.append(name)
    return written


def quantisation_files(source: Path) -> dict[str, Any]:
    """The content of the files beside ``config.json`` that hold quantisation settings, by name."""
    return {name: read_json(source / name) for name in QUANTISATION_FILES if (source / name).is_file()}


def check_settings(snapshot: Snapshot) -> None:
    """Find out before any work whether the quantisation settings of a model can be rewritten.

    Raises:
        UnsupportedModelError: naming a pattern that tells experts apart, and the key that holds it.
    """
    settings = quantisation_files(snapshot.path)
    if QUANTISATION_KEY in snapshot.config:
        settings[f"config.json, {QUANTISATION_KEY}"] = snapshot.config[QUANTISATION_KEY]
    for where, section in settings.items():
        check_quantisation(section, snapshot.moe.family, snapshot.moe.num_experts, snapshot.moe_layers, where)
