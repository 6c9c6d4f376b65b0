"""Two folders that swap their names at once, where the operating system can."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_HERE = -100
"""``AT_FDCWD``: names count from the working folder."""
_EXCHANGE = 2
"""``RENAME_EXCHANGE`` of Linux."""


def exchange(first: Path, second: Path) -> bool:
    """Let two folders swap their names, with no moment at which either name is missing.

    Returns:
        Whether it was done; not every platform and file system can.
    """
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), ctypes.c_uint(_EXCHANGE)) == 0)
