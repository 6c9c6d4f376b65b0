"""Faults written by hand: text files with the lines to look for and those to put in their place.

A file holds one fault or several, apart by lines of ``====``::

    src/shape_moe/selection/budget.py
    <<<<
        for _, row, _ in sorted(entries)[:chunks]:
    >>>>
        for _, row, _ in sorted(entries, reverse=True)[:chunks]:
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from mutation.operators import Mutant, statement_at


def read_patches(project: Path, folder: Path) -> list[Mutant]:
    """Every fault of every file of a folder.

    Raises:
        SystemExit: for a fault whose lines do not occur exactly once.
    """
    found = []
    for file in sorted(folder.glob("*.txt")):
        for part in file.read_text().split("====\n"):
            name, change = part.strip("\n").split("\n<<<<\n")
            old, new = (f"{change}\n").split("\n>>>>\n")
            before = (project / name).read_text()
            if before.count(old) != 1:
                sys.exit(f"{file}: these lines stand {before.count(old)} times in {name}:\n{old}")
            line = before.count("\n", 0, before.index(old)) + 1
            after = before.replace(old, new.rstrip("\n"))
            ast.parse(after)
            first, last = line, line + old.count("\n")
            spans = [span for at in range(first, last + 1) if (span := statement_at(ast.parse(before), at))]
            span = (min(s[0] for s in spans), max(s[1] for s in spans)) if spans else None
            found.append(Mutant(name, line, span, f"by hand ({file.stem})", (old, new), before, after))
    return found
