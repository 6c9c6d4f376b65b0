"""What a pruned checkpoint carries besides weights: its code, and the root files that loaders and servers need."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from shape_moe.architectures.snapshot import ROOT_FILES
from shape_moe.pruning.model_config import CODE_MODULE


def copy_root_files(source: Path, folder: Path) -> list[str]:
    """Copy the original's tokenizer, generation settings, chat template and licence; subfolders are not entered."""
    names = sorted(f.name for f in source.iterdir() if f.is_file() and any(fnmatch(f.name, p) for p in ROOT_FILES))
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return names


def copy_code(folder: Path) -> None:
    """Put the Python file into the checkpoint that ``trust_remote_code=True`` loads."""
    from shape_moe.pruning import modeling_shape_moe

    assert modeling_shape_moe.__file__ is not None
    shutil.copyfile(modeling_shape_moe.__file__, folder / f"{CODE_MODULE}.py")
