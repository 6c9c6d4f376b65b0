"""Looks for calibration text in files that travel: any few consecutive tokens of it, as text or as token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LENGTH = 8
_NUMBERS = re.compile(rb"\d+")


def leaks(folder: Path, sequences: Iterable[Sequence[int]], tokenizer: Any, *, but: Iterable[str] = ()) -> list[str]:
    """Where a folder's files hold :data:`LENGTH` consecutive tokens of the given sequences.

    Args:
        folder: every file in it is read, whatever its type.
        sequences: the token ids that must not be found.
        tokenizer: turns them into the text that must not be found.
        but: paths (of files or folders, relative to the folder) that are left out.

    Returns:
        One line per file that holds some: its path, and the first text found.
    """
    windows = {tuple(row[i : i + LENGTH]) for row in sequences for i in range(len(row) - LENGTH + 1)}
    texts = {text for ids in windows if len(text := tokenizer.decode(list(ids)).strip()) >= LENGTH}
    spellings = {text: {text.encode(), json.dumps(text)[1:-1].encode()} for text in texts}
    skipped = [folder / name for name in but]
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if any(file == path or path in file.parents for path in skipped):
            continue
        content = file.read_bytes()
        if file.suffix == ".safetensors":  # text can only stand in the header: what follows is compared bit by bit
            content = content[: 8 + int.from_bytes(content[:8], "little")]
        hit = next((text for text, forms in spellings.items() if any(form in content for form in forms)), None)
        if hit is None and file.suffix == ".json":
            ids = [int(number) if len(number) < 12 else -1 for number in _NUMBERS.findall(content)]
            rows = (tuple(ids[i : i + LENGTH]) for i in range(len(ids) - LENGTH + 1))
            hit = next((str(row) for row in rows if row in windows), None)
        if hit is not None:
            found.append(f"{file.relative_to(folder).as_posix()}: {hit!r}")
    return found
